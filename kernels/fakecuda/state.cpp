#include "state.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace fakecuda {

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr int kNumCalls = static_cast<int>(Call::NumCalls);
const char* const kNames[kNumCalls] = {
    "malloc", "free", "host_register", "host_unregister", "host_alloc", "stream_create",
    "event_create", "event_record", "stream_wait", "launch", "null_launch", "copy_in", "copy_out",
    "copy_within", "copy_peer", "pageable_in", "pageable_out", "synchronize",
    "device_synchronize", "memset", "misuse"};

long from_environment(const char* name, long otherwise) {
  const char* text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

// How a call fails: it alone; with the device, at once; with the device, once its stream gets to
// what it has enqueued, so that another call is told.
enum Manner { kAlone, kLosing, kLosingLater };

struct Counter {
  std::atomic<long> calls{0};
  std::atomic<long> nbytes{0};
  std::atomic<long> calls_until_failure{0};  // 0: none was asked for
  std::atomic<int> failure{0};
  std::atomic<int> manner{kAlone};
};
std::array<Counter, kNumCalls>& counters() {
  static auto* all = new std::array<Counter, kNumCalls>();
  return *all;
}

std::atomic<int> g_lost{0};
thread_local cudaError_t t_last_error = cudaSuccess;
thread_local cudaError_t t_late_failure = cudaSuccess;

}  // namespace

const Settings& settings() {
  static const Settings found{
      static_cast<int>(from_environment("FAKECUDA_GPUS", 1)),
      static_cast<int>(from_environment("FAKECUDA_CAPABILITY", 90)),
      static_cast<int>(from_environment("FAKECUDA_MULTIPROCESSORS", 128)),
      from_environment("FAKECUDA_CONTEXT_MIB", 500) * kMiB,
      from_environment("FAKECUDA_PIN_LIMIT_MIB", 1 << 30) * kMiB,
      from_environment("FAKECUDA_PEERS", 0) != 0,
      from_environment("FAKECUDA_LAZY_MS", 0),
  };
  return found;
}

std::atomic<size_t>& total_nbytes() {
  static std::atomic<size_t> nbytes{from_environment("FAKECUDA_MEMORY_MIB", 24564) * kMiB};
  return nbytes;
}

std::atomic<size_t>& others_nbytes() {
  static std::atomic<size_t> nbytes{from_environment("FAKECUDA_OTHERS_MIB", 0) * kMiB};
  return nbytes;
}

void count(Call call, size_t nbytes) {
  auto& counter = counters()[static_cast<int>(call)];
  counter.calls++;
  counter.nbytes += static_cast<long>(nbytes);
}

cudaError_t begin(Call call, size_t nbytes) {
  count(call, nbytes);
  auto& counter = counters()[static_cast<int>(call)];
  if (counter.calls_until_failure.load() <= 0 || --counter.calls_until_failure != 0)
    return cudaSuccess;
  auto failure = static_cast<cudaError_t>(counter.failure.load());
  if (counter.manner == kLosingLater) {
    t_late_failure = failure;
    return cudaSuccess;
  }
  if (counter.manner == kLosing) lose_device(failure, "a test asked for it");
  return failure;
}

cudaError_t take_late_failure() { return std::exchange(t_late_failure, cudaSuccess); }

cudaError_t report(cudaError_t error) {
  if (is_lost()) error = static_cast<cudaError_t>(g_lost.load());
  if (error != cudaSuccess) t_last_error = error;
  return error;
}

cudaError_t misuse(const std::string& what, cudaError_t error) {
  count(Call::Misuse);
  fprintf(stderr, "[fakecuda] misuse: %s\n", what.c_str());
  return report(error);
}

void lose_device(cudaError_t error, const std::string& why) {
  fprintf(stderr, "[fakecuda] the device is lost: %s\n", why.c_str());
  int none = 0;
  g_lost.compare_exchange_strong(none, static_cast<int>(error));
}

void find_device() { g_lost = 0; }

bool is_lost() { return g_lost.load() != 0; }

}  // namespace fakecuda

using namespace fakecuda;

// ---- what the tests call

// "name=calls:nbytes" of everything that is counted, separated by blanks.
FAKECUDA_API const char* fakecuda_counters() {
  static thread_local std::string text;
  text.clear();
  for (int i = 0; i < kNumCalls; ++i)
    text += std::string(i ? " " : "") + kNames[i] + "=" + std::to_string(counters()[i].calls) +
            ":" + std::to_string(counters()[i].nbytes);
  return text.c_str();
}

// The nth call of this name from now on fails with `error`, in one of three manners. False if there
// is no such name.
FAKECUDA_API bool fakecuda_fail(const char* name, long nth, int error, int manner) {
  for (int i = 0; i < kNumCalls; ++i) {
    if (strcmp(kNames[i], name)) continue;
    counters()[i].failure = error;
    counters()[i].manner = manner;
    counters()[i].calls_until_failure = nth;
    return true;
  }
  return false;
}

FAKECUDA_API void fakecuda_set_others_mib(long mib) { others_nbytes() = mib * kMiB; }

// Lets each device have this much beside its context.
FAKECUDA_API void fakecuda_set_memory(size_t nbytes) {
  total_nbytes() = nbytes + settings().context;
}

FAKECUDA_API void fakecuda_lose_device() {
  lose_device(cudaErrorAssert, "a test asked for it");
}

// Where a GPU needs a new process, a test goes on.
FAKECUDA_API void fakecuda_find_device() { find_device(); }

// ---- errors, as the runtime has them

FAKECUDA_API cudaError_t cudaGetLastError() {
  if (is_lost()) return report(cudaSuccess);
  auto error = t_last_error;
  t_last_error = cudaSuccess;
  return error;
}

FAKECUDA_API cudaError_t cudaPeekAtLastError() {
  return is_lost() ? report(cudaSuccess) : t_last_error;
}

FAKECUDA_API const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<int, const char*> texts = {
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorInvalidResourceHandle, "invalid resource handle"},
      {cudaErrorNoKernelImageForDevice,
       "no kernel image is available for execution on the device"},
      {cudaErrorNotSupported, "operation not supported"},
      {cudaErrorNotReady, "device not ready"},
      {cudaErrorAssert, "device-side assert triggered"},
      {cudaErrorIllegalAddress, "an illegal memory access was encountered"},
      {cudaErrorLaunchFailure, "unspecified launch failure"},
  };
  auto found = texts.find(error);
  return found == texts.end() ? "an error that the stand-in has no words for" : found->second;
}

FAKECUDA_API const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  snprintf(name, sizeof name, "cudaError%d", static_cast<int>(error));
  return name;
}
