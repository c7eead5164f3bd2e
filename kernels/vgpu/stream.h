// Streams: FIFO queues, each worked off by one thread. Events: points in a stream's order.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>

#include "config.h"
#include "trace.h"

namespace vgpu {

using Clock = std::chrono::steady_clock;
using Task = std::function<void()>;

class VStream;

// One recording of an event. The user's event object points to its latest recording, so that a
// wait enqueued earlier keeps waiting for the recording it was meant for.
class Recording {
 public:
  Recording(const VStream* stream, int64_t id) : stream(stream), id(id) {}
  bool is_done() const { return done_.load(std::memory_order_acquire); }
  void set_done();
  void wait();
  Clock::time_point time() const { return time_; }  // valid once done

  const VStream* const stream;
  const int64_t id;

 private:
  std::mutex mutex_;
  std::condition_variable cv_;
  std::atomic<bool> done_{false};
  Clock::time_point time_;
};
using RecordingPtr = std::shared_ptr<Recording>;

class VStream {
 public:
  VStream(int device, int64_t id);

  // Appends work. `what` and `accesses` go to the trace under the queue lock, so that trace order
  // is queue order.
  void enqueue(Task task, const std::string& what, const Accesses& accesses);
  RecordingPtr record();
  void wait(const RecordingPtr& recording);
  // Blocks the host; rethrows the first error of a task since the last synchronize.
  void synchronize();
  bool is_idle() const { return is_complete(position()); }
  // Also when all that is left is the end of a task that set an event somebody waited for.
  bool is_done();

  // Position in the queue's order: number of tasks enqueued so far. A block freed at position p
  // may be given away once p tasks are complete; cheaper than an event for every free.
  uint64_t position() const { return enqueued_.load(std::memory_order_acquire); }
  bool is_complete(uint64_t position) const {
    return completed_.load(std::memory_order_acquire) >= position;
  }
  void wait_complete(uint64_t position);

  void stop();  // discards what has not started and joins the worker

  const int device;
  const int64_t id;

 private:
  void push_locked(Task task);
  void work();
  void sleep_jitter();

  std::mutex mutex_;
  std::condition_variable wake_;      // the worker sleeps here when the queue is empty
  std::condition_variable progress_;  // hosts sleep here in wait_complete
  std::deque<Task> queue_;
  bool started_ = false;
  bool asleep_ = false;
  std::thread* worker_ = nullptr;
  std::atomic<int> num_waiters_{0};
  std::atomic<uint64_t> enqueued_{0};
  std::atomic<uint64_t> completed_{0};
  std::exception_ptr error_;
  RecordingPtr last_recording_;  // the newest that was enqueued, as task number last_recorded_
  uint64_t last_recorded_ = 0;
  std::minstd_rand jitter_;
  uint64_t jitter_seed_ = 0;
};

// Until when the worker thread that calls this was waiting or busy. A transfer cannot have started
// before that; see link.cpp.
Clock::time_point& worker_busy_since();

VStream& get_stream(int device, int64_t id);
int64_t next_pool_stream(int device);

int current_device();
void set_current_device(int device);
int64_t current_stream_id(int device);
void set_current_stream_id(int device, int64_t id);
inline VStream& current_stream(int device) {
  return get_stream(device, current_stream_id(device));
}

void synchronize_device(int device);
void stop_all_streams();

}  // namespace vgpu
