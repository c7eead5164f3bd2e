// Devices: how many, which is current, what they are, which may copy to each other.
#include <cstdio>
#include <cstring>

#include "streams.h"

namespace fakecuda {

namespace {
thread_local int t_device = 0;
std::atomic<bool> g_has_context[kMaxDevices];
}  // namespace

int current_device() { return t_device; }
void touch_context(int device) { g_has_context[device] = true; }

}  // namespace fakecuda

using namespace fakecuda;

FAKECUDA_API bool fakecuda_has_context(int device) { return g_has_context[device]; }

FAKECUDA_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = settings().gpus;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaGetDevice(int* device) {
  *device = t_device;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings().gpus) return report(cudaErrorInvalidDevice);
  touch_context(device);  // since CUDA 12 this call makes the context
  t_device = device;
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "Stand-in GPU");
  found->totalGlobalMem = total_nbytes();
  found->major = settings().capability / 10;
  found->minor = settings().capability % 10;
  found->multiProcessorCount = settings().multiprocessors;
  found->warpSize = 32;
  found->maxThreadsPerBlock = 1024;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 24;
  found->sharedMemPerBlock = 48 << 10;
  found->sharedMemPerBlockOptin = 99 << 10;
  found->sharedMemPerMultiprocessor = 100 << 10;
  found->regsPerBlock = found->regsPerMultiprocessor = 64 << 10;
  for (int dim = 0; dim < 3; ++dim) {
    found->maxThreadsDim[dim] = dim < 2 ? 1024 : 64;
    found->maxGridSize[dim] = dim ? 65535 : 2147483647;
  }
  found->l2CacheSize = 72 << 20;
  found->memoryBusWidth = 384;
  found->textureAlignment = 512;
  found->unifiedAddressing = found->concurrentKernels = 1;
  found->asyncEngineCount = 2;
  found->pciBusID = device + 1;
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  cudaDeviceProp of;
  cudaGetDeviceProperties(&of, device);
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: *value = of.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = of.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of.sharedMemPerBlockOptin; break;
    case cudaDevAttrWarpSize: *value = of.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = of.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = of.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = of.minor; break;
    case cudaDevAttrMaxGridDimX: *value = of.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = of.maxGridSize[1]; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = of.maxThreadsDim[0]; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = of.maxThreadsPerMultiProcessor; break;
    default: *value = 1;
  }
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaDeviceGetPCIBusId(char* text, int nbytes, int device) {
  snprintf(text, nbytes, "0000:%02x:00.0", device + 1);
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = settings().peers;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return report(settings().peers ? cudaSuccess : cudaErrorPeerAccessUnsupported);
}
FAKECUDA_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// ---- what PyTorch asks the driver for

namespace {
int primary_context_state(int device, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = g_has_context[device];
  return 0;
}
int current_context(void** context) {
  static int one;
  *context = &one;
  return 0;
}
int driver_error(int, const char** text) {
  *text = "an error of the stand-in";
  return 0;
}
int nothing() { return 0; }
}  // namespace

FAKECUDA_API cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result) {
  std::string wanted = name;
  void* found = reinterpret_cast<void*>(nothing);
  if (wanted == "cuDevicePrimaryCtxGetState")
    found = reinterpret_cast<void*>(primary_context_state);
  if (wanted == "cuCtxGetCurrent") found = reinterpret_cast<void*>(current_context);
  if (wanted == "cuGetErrorString") found = reinterpret_cast<void*>(driver_error);
  *function = found;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
