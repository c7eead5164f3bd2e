#include "link.h"

#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "stream.h"

namespace vgpu {

namespace {

// Concurrent copies over one link share it chunk by chunk.
constexpr size_t kChunkNbytes = size_t{1} << 20;

// A thread that sleeps wakes late. A copy that follows at once may catch up this much, or
// throughput would be lost with every sleep; after an idle time there is nothing to catch up.
constexpr auto kMaxCredit = std::chrono::milliseconds(1);

// Within a copy, running ahead this much is cheaper than a sleep for every chunk.
constexpr auto kMaxAhead = std::chrono::microseconds(250);

class Link {
 public:
  // Books the link for a transfer; returns when it ends on an ideal wire.
  Clock::time_point book(size_t nbytes, double rate, Clock::time_point earliest) {
    total_nbytes.fetch_add(nbytes, std::memory_order_relaxed);
    if (rate <= 0) return {};
    std::lock_guard<std::mutex> lock(mutex_);
    free_from_ = std::max(free_from_, earliest) +
                 std::chrono::nanoseconds(static_cast<int64_t>(nbytes / rate * 1e9));
    return free_from_;
  }
  std::atomic<uint64_t> total_nbytes{0};

 private:
  std::mutex mutex_;
  Clock::time_point free_from_;
};

Link& link_of(int device, Direction direction) {
  static auto* links = new std::array<std::array<Link, kNumDirections>, kMaxDevices>();
  return (*links)[device][static_cast<int>(direction)];
}

double rate_of(Direction direction) {
  switch (direction) {
    case Direction::HostToDevice: return config().h2d_rate;
    case Direction::DeviceToHost: return config().d2h_rate;
    default: return config().p2p_rate;
  }
}

class Pacer {
 public:
  explicit Pacer(const std::vector<Hop>& hops) : hops_(hops) {
    earliest_ = std::max(worker_busy_since(), Clock::now() - kMaxCredit);
  }
  void transferred(size_t nbytes, bool is_last) {
    Clock::time_point end{};
    for (const auto& hop : hops_) {
      double rate = rate_of(hop.direction);
      end = std::max(end, link_of(hop.device, hop.direction).book(nbytes, rate, earliest_));
    }
    if (is_last || end - Clock::now() > kMaxAhead) std::this_thread::sleep_until(end);
    // Not the time now: what comes next may make up for waking late, on whatever link.
    if (is_last) worker_busy_since() = end > Clock::time_point{} ? end : Clock::now();
  }

 private:
  const std::vector<Hop>& hops_;
  Clock::time_point earliest_;
};

bool is_plain_copy(const at::Tensor& dst, const at::Tensor& src) {
  return dst.scalar_type() == src.scalar_type() && dst.strides().equals(src.strides()) &&
         dst.is_non_overlapping_and_dense() && src.is_conj() == dst.is_conj() &&
         src.is_neg() == dst.is_neg();
}

}  // namespace

uint64_t link_nbytes(int device, Direction direction) {
  return link_of(device, direction).total_nbytes;
}

void reset_link_counters() {
  for (int device = 0; device < kMaxDevices; ++device)
    for (int d = 0; d < kNumDirections; ++d)
      link_of(device, static_cast<Direction>(d)).total_nbytes = 0;
}

void copy_over_links(const at::Tensor& dst, const at::Tensor& src, const std::vector<Hop>& hops) {
  Pacer pacer(hops);
  if (!is_plain_copy(dst, src)) {
    dst.copy_(src);
    pacer.transferred(std::min(dst.element_size(), src.element_size()) * dst.numel(), true);
    return;
  }
  auto* to = static_cast<char*>(dst.mutable_data_ptr());
  auto* from = static_cast<const char*>(src.const_data_ptr());
  size_t nbytes = dst.nbytes();
  for (size_t done = 0; done < nbytes;) {
    size_t chunk = std::min(kChunkNbytes, nbytes - done);
    memcpy(to + done, from + done, chunk);
    done += chunk;
    pacer.transferred(chunk, done == nbytes);
  }
}

}  // namespace vgpu
