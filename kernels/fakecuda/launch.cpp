// Launches of compiled kernels, and the libraries above them (cuBLAS, cuDNN). Neither computes
// here: where results are wanted, kernels.cpp answers operators before they get this far, and what
// gets here all the same is refused by name.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <set>

#include "streams.h"

namespace fakecuda {

namespace {

std::atomic<bool> g_refuses{false};

struct Names {
  std::mutex mutex;
  std::map<const void*, const char*> of;
  std::set<std::string> launched;
};
Names& names() {
  static auto* all = new Names();
  return *all;
}

// The first launch of a kernel takes long: its code is loaded then.
void load_lazily(const std::string& kernel) {
  if (!settings().lazy_ms) return;
  {
    std::lock_guard<std::mutex> lock(names().mutex);
    if (!names().launched.insert(kernel).second) return;
  }
  usleep(settings().lazy_ms * 1000);
}

cudaError_t refuse(const std::string& what) {
  fprintf(stderr, "[fakecuda] nothing here answers %s\n", what.c_str());
  return report(cudaErrorNotSupported);
}

std::string name_of(const void* kernel) {
  std::lock_guard<std::mutex> lock(names().mutex);
  auto found = names().of.find(kernel);
  return found == names().of.end() ? "a kernel without a name" : found->second;
}

cudaError_t launch(const void* kernel, cudaStream_t handle) {
  if (!handle) count(Call::NullLaunch);
  if (auto error = begin(Call::Launch)) return report(error);
  if (settings().capability < 50) return report(cudaErrorNoKernelImageForDevice);
  auto* stream = find_stream(handle);
  if (!stream) return misuse("a kernel is launched on an unknown stream");
  if (stream->device != current_device())
    return misuse("a kernel is launched on a stream of a device that is not current");
  std::string name = name_of(kernel);
  load_lazily(name);
  return g_refuses ? refuse(name) : report(cudaSuccess);
}

thread_local cudaStream_t t_pushed;

}  // namespace

}  // namespace fakecuda

using namespace fakecuda;

// From now on kernels and library calls that nothing answers are errors instead of doing nothing.
FAKECUDA_API void fakecuda_refuse_unanswered() { g_refuses = true; }

// The time that an operator's first run takes (see kernels.cpp).
FAKECUDA_API void fakecuda_load(const char* kernel) { load_lazily(kernel); }

FAKECUDA_API unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t stream) {
  t_pushed = stream;
  return 0;
}
FAKECUDA_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                                    void* stream) {
  *grid = *block = dim3();
  *shared = 0;
  *static_cast<cudaStream_t*>(stream) = t_pushed;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t,
                                          cudaStream_t stream) {
  return launch(kernel, stream);
}
FAKECUDA_API cudaError_t __cudaLaunchKernel(void* kernel, dim3, dim3, void**, size_t,
                                            cudaStream_t stream) {
  return launch(kernel, stream);
}
FAKECUDA_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel,
                                             void**) {
  return launch(kernel, how->stream);
}
FAKECUDA_API cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return cudaSuccess;
}

// ---- what a library with kernels does when it is loaded

FAKECUDA_API void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}
FAKECUDA_API void __cudaRegisterFatBinaryEnd(void**) {}
FAKECUDA_API void __cudaUnregisterFatBinary(void**) {}
FAKECUDA_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name,
                                         int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> lock(names().mutex);
  names().of[function] = name;
}
FAKECUDA_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
FAKECUDA_API char __cudaInitModule(void**) { return 1; }

FAKECUDA_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  *found = {};
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = settings().capability;
  found->maxDynamicSharedSizeBytes = 99 << 10;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*,
                                                                       int, size_t) {
  *blocks = 2;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char zeros[1 << 16];
  *address = zeros;
  return report(cudaSuccess);
}

// ---- the libraries: all functions but these come from build.py and call this

FAKECUDA_API int fakecuda_library_call(const char* name) {
  static const char* const harmless[] = {"Create", "Destroy", "Set", "Get", "Init"};
  for (const auto* word : harmless)
    if (strstr(name, word)) return 0;
  count(Call::Launch);
  return g_refuses ? static_cast<int>(refuse(name)) : 0;
}

namespace {
// Each its own: PyTorch keeps a workspace for every one and stream.
int make_handle(void** handle) {
  *handle = new int();
  return 0;
}
}  // namespace

FAKECUDA_API int cublasCreate_v2(void** handle) { return make_handle(handle); }
FAKECUDA_API int cublasLtCreate(void** handle) { return make_handle(handle); }
FAKECUDA_API int cudnnCreate(void** handle) { return make_handle(handle); }
FAKECUDA_API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
FAKECUDA_API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
// One algorithm is found, so that the product is called.
FAKECUDA_API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*,
                                                int wanted, void* results, int* found) {
  constexpr size_t kResultNbytes = 96;
  memset(results, 0, wanted * kResultNbytes);
  *found = 1;
  return 0;
}
