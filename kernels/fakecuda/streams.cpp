#include "streams.h"

#include <set>

namespace fakecuda {

namespace {

int64_t next_recording() {
  static std::atomic<int64_t> next{1};
  return next++;
}

}  // namespace

Recording::Recording() : id(next_recording()) {}

void Recording::set_done() {
  std::lock_guard<std::mutex> lock(mutex_);
  done_ = true;
  time_ = Clock::now();
  changed_.notify_all();
}

void Recording::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
}

bool Recording::is_done() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

Clock::time_point Recording::time() {
  std::lock_guard<std::mutex> lock(mutex_);
  return time_;
}

namespace {

struct Event {
  int device;
  bool has_time;
  RecordingPtr recording;  // null until the first
};

// All of these live as long as the process: threads may still use them when it exits.
struct Registry {
  std::mutex mutex;
  std::set<Stream*> streams;
  std::set<Event*> events;
  Stream* defaults[kMaxDevices] = {};
  int num_made[kMaxDevices] = {};
};
Registry& registry() {
  static auto* all = new Registry();
  return *all;
}

// Under the registry's lock. Number 0 is the default stream's.
Stream* make_stream(int device, bool is_blocking) {
  auto* stream = new Stream(device, ++registry().num_made[device], is_blocking);
  registry().streams.insert(stream);
  return stream;
}

Stream* default_stream(int device) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.defaults[device]) {
    all.defaults[device] = new Stream(device, 0, true);
    all.streams.insert(all.defaults[device]);
  }
  return all.defaults[device];
}

std::vector<Stream*> streams_of(int device) {
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::vector<Stream*> found;
  for (auto* stream : all.streams)
    if (stream->device == device) found.push_back(stream);
  return found;
}

Event* find_event(cudaEvent_t handle) {
  auto* event = reinterpret_cast<Event*>(handle);
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.events.count(event) ? event : nullptr;
}

}  // namespace

Stream* find_stream(cudaStream_t handle) {
  if (!handle || handle == cudaStreamLegacy) return default_stream(current_device());
  auto* stream = reinterpret_cast<Stream*>(handle);
  auto& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.streams.count(stream) ? stream : nullptr;
}

void synchronize_device(int device) {
  for (auto* stream : streams_of(device)) stream->drain();
  trace(Kind::DeviceSync, device, -1);
}

void Stream::push_locked(Task task) {
  queue_.push_back(std::move(task));
  enqueued_++;
  if (!started_) {
    started_ = true;  // PyTorch makes 32 streams at a time and uses a few
    std::thread([this] { work(); }).detach();
  }
  changed_.notify_all();
}

void Stream::enqueue(Task task, const char* what, const Accesses& accesses) {
  // The default stream and those in step with it wait for each other.
  if (is_blocking) {
    auto* first = default_stream(device);
    if (this != first) {
      wait(first->record());
    } else {
      for (auto* other : streams_of(device))
        if (other != this && other->is_blocking) wait(other->record());
    }
  }
  if (auto error = take_late_failure())
    task = [error, task = std::move(task)] {
      lose_device(error, "a test asked for it, of what a stream runs");
      task();
    };
  std::lock_guard<std::mutex> lock(mutex_);
  trace(Kind::Kernel, device, number, 0, what, accesses);
  push_locked(std::move(task));
}

RecordingPtr Stream::record() {
  auto recording = std::make_shared<Recording>();
  std::lock_guard<std::mutex> lock(mutex_);
  trace(Kind::EventRecord, device, number, recording->id);
  if (completed_ == enqueued_)
    recording->set_done();
  else
    push_locked([recording] { recording->set_done(); });
  return recording;
}

void Stream::wait(const RecordingPtr& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  trace(Kind::StreamWait, device, number, recording->id);
  if (!recording->is_done()) push_locked([recording] { recording->wait(); });
}

void Stream::drain() {
  std::unique_lock<std::mutex> lock(mutex_);
  uint64_t target = enqueued_;
  changed_.wait(lock, [&] { return completed_ >= target; });
}

void Stream::synchronize() {
  drain();
  std::lock_guard<std::mutex> lock(mutex_);
  trace(Kind::StreamSync, device, number);
}

bool Stream::is_idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return completed_ == enqueued_;
}

void Stream::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return !queue_.empty(); });
    Task task = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    task();
    task = nullptr;  // what it holds is released before it counts as complete
    lock.lock();
    completed_++;
    changed_.notify_all();
  }
}

}  // namespace fakecuda

using namespace fakecuda;

// ---- streams

FAKECUDA_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int) {
  if (auto error = begin(Call::StreamCreate)) return report(error);
  touch_context(current_device());
  std::lock_guard<std::mutex> lock(registry().mutex);
  *made = reinterpret_cast<cudaStream_t>(
      make_stream(current_device(), !(flags & cudaStreamNonBlocking)));
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
FAKECUDA_API cudaError_t cudaStreamCreate(cudaStream_t* made) {
  return cudaStreamCreateWithPriority(made, cudaStreamDefault, 0);
}
FAKECUDA_API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  auto* stream = find_stream(handle);
  if (!stream) return misuse("an unknown stream is destroyed");
  return report(cudaSuccess);  // its thread stays asleep
}
FAKECUDA_API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  auto* stream = find_stream(handle);
  if (!stream) return misuse("an unknown stream is asked");
  if (is_lost()) return report(cudaSuccess);
  return stream->is_idle() ? cudaSuccess : cudaErrorNotReady;
}
FAKECUDA_API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  if (auto error = begin(Call::Synchronize)) return report(error);
  auto* stream = find_stream(handle);
  if (!stream) return misuse("an unknown stream is synchronized");
  stream->synchronize();
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaDeviceSynchronize() {
  if (auto error = begin(Call::DeviceSynchronize)) return report(error);
  synchronize_device(current_device());
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle,
                                             unsigned) {
  if (auto error = begin(Call::StreamWait)) return report(error);
  auto* stream = find_stream(handle);
  auto* event = find_event(event_handle);
  if (!stream || !event) return misuse("an unknown stream or event is waited with");
  if (event->recording) stream->wait(event->recording);
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function,
                                            void* argument) {
  auto* stream = find_stream(handle);
  if (!stream) return misuse("a host function on an unknown stream");
  stream->enqueue([=] { function(argument); }, "host function", {});
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function,
                                               void* argument, unsigned) {
  auto* stream = find_stream(handle);
  if (!stream) return misuse("a callback on an unknown stream");
  stream->enqueue([=] { function(handle, cudaSuccess, argument); }, "host function", {});
  return report(cudaSuccess);
}

// Captures of graphs are not imitated: no stream ever captures.
FAKECUDA_API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                                  unsigned long long* id, cudaGraph_t*,
                                                  const cudaGraphNode_t**,
                                                  const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}

// ---- events

FAKECUDA_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned flags) {
  if (auto error = begin(Call::EventCreate)) return report(error);
  touch_context(current_device());
  auto* event = new Event{current_device(), !(flags & cudaEventDisableTiming), nullptr};
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().events.insert(event);
  *made = reinterpret_cast<cudaEvent_t>(event);
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaEventCreate(cudaEvent_t* made) {
  return cudaEventCreateWithFlags(made, cudaEventDefault);
}
FAKECUDA_API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  auto* event = find_event(handle);
  if (!event) return misuse("an unknown event is destroyed");
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().events.erase(event);
  delete event;
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  if (auto error = begin(Call::EventRecord)) return report(error);
  auto* event = find_event(handle);
  auto* stream = find_stream(stream_handle);
  if (!event || !stream) return misuse("an unknown event or stream is recorded");
  if (event->device != stream->device)
    return misuse("an event is recorded on a stream of another device");
  event->recording = stream->record();
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                                  unsigned) {
  return cudaEventRecord(event, stream);
}
FAKECUDA_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto* event = find_event(handle);
  if (!event) return misuse("an unknown event is asked");
  if (is_lost()) return report(cudaSuccess);
  auto recording = event->recording;
  if (!recording) return cudaSuccess;
  if (!recording->is_done()) return cudaErrorNotReady;
  trace(Kind::EventSync, -1, -1, recording->id);  // the host may rely on it
  return cudaSuccess;
}
FAKECUDA_API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  if (auto error = begin(Call::Synchronize)) return report(error);
  auto* event = find_event(handle);
  if (!event) return misuse("an unknown event is synchronized");
  auto recording = event->recording;
  if (recording) {
    recording->wait();
    trace(Kind::EventSync, -1, -1, recording->id);
  }
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t first, cudaEvent_t second) {
  auto *a = find_event(first), *b = find_event(second);
  if (!a || !b || !a->recording || !b->recording || !a->has_time || !b->has_time)
    return misuse("the time between events that are not recorded, or keep none");
  if (a->device != b->device) return misuse("the time between events of two devices");
  if (!a->recording->is_done() || !b->recording->is_done()) return report(cudaErrorNotReady);
  auto took = b->recording->time() - a->recording->time();
  *ms = std::chrono::duration<float, std::milli>(took).count();
  return report(cudaSuccess);
}

// ---- for the kernels (kernels.cpp): work on a stream, which the counters do not show as syncs

using KernelTask = void (*)(void*);
FAKECUDA_API int fakecuda_enqueue(cudaStream_t handle, KernelTask run, void* argument,
                                  const char* what, const Accesses& accesses) {
  if (auto error = begin(Call::Launch)) return report(error);
  auto* stream = find_stream(handle);
  if (!stream) return misuse("a kernel on an unknown stream");
  if (is_lost()) return report(cudaSuccess);
  stream->enqueue([=] { run(argument); }, what, accesses);
  return cudaSuccess;  // what it fails with is seen later; from here on the stream has it
}
FAKECUDA_API void fakecuda_wait(cudaStream_t handle) {
  if (auto* stream = find_stream(handle)) stream->synchronize();
}
FAKECUDA_API int64_t fakecuda_stream_number(cudaStream_t handle) {
  auto* stream = handle ? find_stream(handle) : nullptr;
  return stream ? stream->number : 0;
}
FAKECUDA_API void fakecuda_kernel_failed(const char* why) {
  lose_device(cudaErrorAssert, why);
}

// ---- for the tests

// Makes a stream stand still until released.
FAKECUDA_API void* fakecuda_hold(cudaStream_t handle) {
  auto* stream = find_stream(handle);
  if (!stream) return nullptr;
  auto* gate = new RecordingPtr(std::make_shared<Recording>());
  stream->enqueue([gate = *gate] { gate->wait(); }, "held", {});
  return gate;
}
FAKECUDA_API void fakecuda_release(void* gate) {
  auto* recording = static_cast<RecordingPtr*>(gate);
  (*recording)->set_done();
  delete recording;
}
