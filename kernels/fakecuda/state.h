// What all of the stand-in shares: settings, counters, faults on demand, errors.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <string>

#define FAKECUDA_API extern "C" __attribute__((visibility("default")))

namespace fakecuda {

constexpr int kMaxDevices = 16;

// From the environment, read once; README.md says what each means.
struct Settings {
  int gpus, capability, multiprocessors;
  size_t context, pin_limit;
  bool peers;
  long lazy_ms;
};
const Settings& settings();

// Bytes of each device, and those that other processes hold; may change while the process runs.
std::atomic<size_t>& total_nbytes();
std::atomic<size_t>& others_nbytes();

// What is counted, and what can be made to fail. The names are in state.cpp, in this order.
enum class Call {
  Malloc, Free, HostRegister, HostUnregister, HostAlloc, StreamCreate, EventCreate, EventRecord,
  StreamWait, Launch, NullLaunch, CopyIn, CopyOut, CopyWithin, CopyPeer, PageableIn, PageableOut,
  Synchronize, DeviceSynchronize, Memset, Misuse, NumCalls
};
void count(Call call, size_t nbytes = 0);

// Counts the call and returns the error that was asked for it, else cudaSuccess.
cudaError_t begin(Call call, size_t nbytes = 0);

// The error with which what the calling thread is about to enqueue will lose the device, when the
// stream gets to it; cudaSuccess where none was asked for.
cudaError_t take_late_failure();

// Remembers an error as the calling thread's last one, as the runtime does, and returns it.
// Once a device is lost every call reports that.
cudaError_t report(cudaError_t error);

// A rule of CUDA was broken: says so, counts it, reports an error.
cudaError_t misuse(const std::string& what, cudaError_t error = cudaErrorInvalidResourceHandle);

// What a kernel that fails does: from now on no call works.
void lose_device(cudaError_t error, const std::string& why);
void find_device();  // as if nothing had been
bool is_lost();

int current_device();
void touch_context(int device);  // what makes a context, as cudaSetDevice does

}  // namespace fakecuda
