#include <thread>

#include "stream.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <sys/prctl.h>

#include <array>

// Thread-local thread counts of the libraries below ATen. at::set_num_threads() would change
// MKL's process-wide setting and the default of every thread made later.
extern "C" void omp_set_num_threads(int) __attribute__((weak));
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace vgpu {

Clock::time_point& worker_busy_since() {
  static thread_local Clock::time_point since = Clock::now();
  return since;
}

void Recording::set_done() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    time_ = Clock::now();
    done_.store(true, std::memory_order_release);
  }
  cv_.notify_all();
}

void Recording::wait() {
  if (is_done()) return;
  std::unique_lock<std::mutex> lock(mutex_);
  // The timeout is only for shutdown, when the stream that should set this may be gone.
  while (!cv_.wait_for(lock, std::chrono::milliseconds(100), [&] { return is_done(); }))
    if (stopping()) return;
  worker_busy_since() = Clock::now();
}

VStream::VStream(int device, int64_t id) : device(device), id(id) {}

void VStream::push_locked(Task task) {
  check_not_forked();
  if (stopping()) return;
  queue_.push_back(std::move(task));
  enqueued_.fetch_add(1, std::memory_order_release);
  if (!started_) {
    started_ = true;
    worker_ = new std::thread([this] { work(); });
  } else if (asleep_) {
    asleep_ = false;  // one wake-up call is enough, and it is the dear part of an enqueue
    wake_.notify_one();
  }
}

void VStream::enqueue(Task task, const std::string& what, const Accesses& accesses) {
  trace::adopt_host_thread();
  std::lock_guard<std::mutex> lock(mutex_);
  trace::add(Kind::Kernel, device, id, 0, what, accesses);
  push_locked(std::move(task));
}

RecordingPtr VStream::record() {
  auto recording = std::make_shared<Recording>(this, trace::new_token());
  std::lock_guard<std::mutex> lock(mutex_);
  trace::add(Kind::EventRecord, device, id, recording->id);
  if (is_idle()) {
    recording->set_done();
  } else {
    push_locked([recording] { recording->set_done(); });
    last_recording_ = recording;
    last_recorded_ = position();
  }
  return recording;
}

bool VStream::is_done() {
  if (is_idle()) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  return last_recording_ && last_recorded_ == position() && last_recording_->is_done();
}

void VStream::wait(const RecordingPtr& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  trace::add(Kind::StreamWait, device, id, recording->id);
  if (recording->stream == this || recording->is_done()) return;
  push_locked([recording] { recording->wait(); });
}

void VStream::wait_complete(uint64_t position) {
  if (is_complete(position)) return;
  ++num_waiters_;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!progress_.wait_for(lock, std::chrono::milliseconds(100),
                               [&] { return is_complete(position); }))
      if (stopping()) break;
  }
  --num_waiters_;
}

void VStream::synchronize() {
  check_not_forked();
  wait_complete(position());
  std::exception_ptr error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    trace::add(Kind::StreamSync, device, id, 0);
    std::swap(error, error_);
  }
  if (error) std::rethrow_exception(error);
}

void VStream::sleep_jitter() {
  double max_us = config().jitter_us;
  if (max_us <= 0) return;
  uint64_t seed = config().jitter_seed * 1000003 + device * 1009 + id + 1;
  if (seed != jitter_seed_) jitter_.seed(jitter_seed_ = seed);
  sleep_us(std::uniform_real_distribution<double>(0, max_us)(jitter_));
}

void VStream::work() {
  // The order matters: ATen sets its per-thread count on first use and would undo ours.
  at::get_num_threads();
  if (omp_set_num_threads) omp_set_num_threads(config().num_threads);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(config().num_threads);
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);  // default 50 us: too coarse to pace small copies
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (queue_.empty() && !stopping()) {
      asleep_ = true;
      wake_.wait(lock, [&] { return !queue_.empty() || stopping(); });
      asleep_ = false;
      worker_busy_since() = Clock::now();
    }
    if (stopping()) return;
    Task task = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      sleep_jitter();
      task();
    } catch (...) {
      error = std::current_exception();
    }
    task = nullptr;  // what it holds must be released before it counts as complete
    if (error) {
      std::lock_guard<std::mutex> guard(mutex_);
      if (!error_) error_ = error;
    }
    completed_.fetch_add(1, std::memory_order_acq_rel);
    lock.lock();
    if (num_waiters_ > 0) progress_.notify_all();
  }
}

void VStream::stop() {
  std::deque<Task> discarded;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    discarded.swap(queue_);
    wake_.notify_all();
    progress_.notify_all();
  }
  if (worker_ && worker_->joinable()) worker_->join();
}

namespace {

struct DeviceStreams {
  std::mutex mutex;
  std::array<std::atomic<VStream*>, kNumPoolStreams + 1> streams{};
  std::atomic<uint64_t> next{0};
};

DeviceStreams& device_streams(int device) {
  static auto* all = new std::array<DeviceStreams, kMaxDevices>();
  return (*all)[device];
}

thread_local int t_device = 0;
thread_local std::array<int64_t, kMaxDevices> t_streams{};

}  // namespace

VStream& get_stream(int device, int64_t id) {
  TORCH_CHECK(device >= 0 && device < kMaxDevices && id >= 0 && id <= kNumPoolStreams,
              "vgpu: no stream ", id, " on device ", device);
  auto& pool = device_streams(device);
  VStream* stream = pool.streams[id].load(std::memory_order_acquire);
  if (!stream) {
    std::lock_guard<std::mutex> lock(pool.mutex);
    stream = pool.streams[id].load(std::memory_order_acquire);
    if (!stream) pool.streams[id] = stream = new VStream(device, id);
  }
  return *stream;
}

int64_t next_pool_stream(int device) {
  return 1 + static_cast<int64_t>(device_streams(device).next++ % kNumPoolStreams);
}

int current_device() { return t_device < config().count ? t_device : 0; }

void set_current_device(int device) {
  TORCH_CHECK(device >= 0 && device < config().count, "vgpu: invalid device index ", device,
              "; there are ", config().count.load(), " virtual GPUs (0 to ",
              config().count - 1, ")");
  t_device = device;
}

int64_t current_stream_id(int device) { return t_streams[device]; }
void set_current_stream_id(int device, int64_t id) { t_streams[device] = id; }

template <typename F>
static void for_each_stream(int device, F f) {
  for (auto& slot : device_streams(device).streams)
    if (VStream* stream = slot.load(std::memory_order_acquire)) f(*stream);
}

void synchronize_device(int device) {
  std::exception_ptr first;
  for_each_stream(device, [&](VStream& stream) {
    try {
      stream.synchronize();
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  });
  trace::add(Kind::DeviceSync, device, -1, 0);
  if (first) std::rethrow_exception(first);
}

void stop_all_streams() {
  // In a forked child the threads do not exist: there is nothing to stop, and locks may be held.
  if (in_forked_child() || stopping().exchange(true)) return;
  for (int device = 0; device < kMaxDevices; ++device)
    for_each_stream(device, [](VStream& stream) { stream.stop(); });
}

}  // namespace vgpu
