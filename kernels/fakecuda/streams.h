// Streams: queues that a thread each works off in order. Events: points in a stream's order.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "state.h"
#include "tracing.h"

namespace fakecuda {

using Clock = std::chrono::steady_clock;
using Task = std::function<void()>;

// One recording of an event: who waits goes on waiting for the recording it was meant for, also
// when the event is recorded again.
class Recording {
 public:
  Recording();
  void set_done();
  void wait();
  bool is_done();
  Clock::time_point time();

  const int64_t id;  // in the trace

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  Clock::time_point time_;
};
using RecordingPtr = std::shared_ptr<Recording>;

class Stream {
 public:
  // `number` counts the streams of a device. `waits_for_default`: as made without
  // cudaStreamNonBlocking, in step with the default stream.
  Stream(int device, int number, bool waits_for_default)
      : device(device), number(number), is_blocking(waits_for_default) {}
  // Appends work. `what` and `accesses` go to the trace under the queue's lock, so that the order
  // of the trace is that of the queue.
  void enqueue(Task task, const char* what, const Accesses& accesses);
  RecordingPtr record();
  void wait(const RecordingPtr& recording);
  void synchronize();
  void drain();  // the same, said to the trace by the caller
  bool is_idle();

  const int device;
  const int number;
  const bool is_blocking;

 private:
  void push_locked(Task task);
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> queue_;
  uint64_t enqueued_ = 0, completed_ = 0;
  bool started_ = false;
};

// The stream of a handle; null is the default stream of the current device. Null result: unknown.
Stream* find_stream(cudaStream_t handle);

// Waits for all streams of a device.
void synchronize_device(int device);

}  // namespace fakecuda
