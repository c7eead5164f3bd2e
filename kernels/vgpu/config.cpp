#include "config.h"

#include <c10/util/Exception.h>
#include <pthread.h>

#include <chrono>
#include <thread>

namespace vgpu {

Config& config() {
  static Config* instance = new Config();  // leaked: workers may outlive static destructors
  return *instance;
}

static std::atomic<bool> g_forked{false};
static const int g_atfork = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

bool in_forked_child() { return g_forked.load(std::memory_order_relaxed); }

void check_not_forked() {
  TORCH_CHECK(
      !in_forked_child(),
      "Cannot use vgpu in a forked subprocess: its streams are threads of the parent. "
      "Start the process with the 'spawn' or 'forkserver' method instead.");
}

std::atomic<bool>& stopping() {
  static std::atomic<bool> flag{false};
  return flag;
}

void sleep_us(double us) {
  if (us > 0)
    std::this_thread::sleep_for(std::chrono::nanoseconds(static_cast<int64_t>(us * 1e3)));
}

}  // namespace vgpu
