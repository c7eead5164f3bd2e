// Settings of the virtual GPUs, and the process-wide state flags every other file asks about.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace vgpu {

constexpr int kMaxDevices = 16;

// Streams come from a pool per device, like CUDA's: ids 1..kNumPoolStreams round robin, 0 is the
// default stream. A bounded pool bounds the number of worker threads.
constexpr int kNumPoolStreams = 32;

// All members may be read by worker threads while Python changes them, hence atomic.
// Rates are bytes per second; 0 means not throttled.
struct Config {
  std::atomic<int> count{2};
  std::atomic<size_t> memory_nbytes{size_t{1} << 30};
  std::atomic<double> h2d_rate{0};
  std::atomic<double> d2h_rate{0};
  std::atomic<double> p2p_rate{0};
  std::atomic<double> delay_us{0};   // added to every kernel
  std::atomic<double> slowdown{1};   // a kernel takes this many times its CPU time
  std::atomic<double> jitter_us{0};  // random delay before each task, uniform in [0, jitter_us)
  std::atomic<uint64_t> jitter_seed{0};
  std::atomic<int> num_threads{1};  // intra-op threads of each stream's worker
};

Config& config();

// True in a child made by fork(): worker threads do not exist there, so nothing can run.
bool in_forked_child();
void check_not_forked();

// True once the process shuts down: streams take no more work, waits give up.
std::atomic<bool>& stopping();

void sleep_us(double us);

}  // namespace vgpu
