// The C functions that harmony/vgpu/api.py calls through ctypes. Errors come back as text.
#include <ATen/Context.h>
#include <torch/csrc/autograd/engine.h>

#include <cstdlib>
#include <memory>
#include <sstream>
#include <thread>

#include "capi.h"
#include "config.h"
#include "link.h"
#include "memory.h"
#include "pinned.h"
#include "random.h"
#include "stream.h"

namespace vgpu {

// Valid until the next error of the same thread; null means success.
static const char* error_text(std::string message) {
  static thread_local std::string text;
  text = std::move(message);
  return text.empty() ? nullptr : text.c_str();
}

struct EngineAccess : torch::autograd::Engine {
  static auto& queues(torch::autograd::Engine& engine) {
    return engine.*(&EngineAccess::device_ready_queues_);
  }
};

// Autograd starts one thread for each device at the first backward and never more. Starting them
// for the largest number of devices now allows to raise the count later. If the process has run a
// backward before the virtual GPUs were loaded, the engine knows of no device and its pool cannot
// be started again: then the missing threads are added as Engine::start_device_threads does it.
static void start_autograd_threads() {
  static bool done = false;
  if (done) return;
  done = true;
  int count = config().count.exchange(kMaxDevices);
  auto& engine = torch::autograd::Engine::get_default_engine();
  engine.initialize_device_threads_pool();
  auto& queues = EngineAccess::queues(engine);
  for (int device = static_cast<int>(queues.size()); device < kMaxDevices; ++device) {
    queues.push_back(std::make_shared<torch::autograd::ReadyQueue>());
    std::thread(&torch::autograd::Engine::thread_init, &engine, device, queues.back(), true)
        .detach();
  }
  config().count = count;
}

}  // namespace vgpu

using namespace vgpu;

VGPU_API const char* vgpu_configure(int count, uint64_t memory_nbytes) {
  if (in_forked_child()) return error_text("cannot configure in a forked subprocess");
  if (count < 1 || count > kMaxDevices)
    return error_text("count must be from 1 to 16, not " + std::to_string(count));
  Config& c = config();
  if (count != c.count || memory_nbytes != c.memory_nbytes) {
    if (size_t live = live_nbytes()) {
      std::ostringstream message;
      message << live << " bytes of device memory are in use, so " << c.count
              << " virtual GPUs of " << c.memory_nbytes << " bytes cannot become " << count
              << " of " << memory_nbytes << "; delete the tensors on them first";
      return error_text(message.str());
    }
    for (int device = 0; device < kMaxDevices; ++device) {
      try {
        synchronize_device(device);
      } catch (const std::exception&) {  // of a kernel nobody waited for; its memory is gone
      }
    }
    reset_memory();
    c.memory_nbytes = memory_nbytes;
    c.count = count;
  }
  start_autograd_threads();
  // PyTorch asks a device what is pinned only once it counts as initialized.
  at::globalContext().lazyInitDevice(c10::kPrivateUse1);
  return nullptr;
}

VGPU_API void vgpu_set_links(double h2d_rate, double d2h_rate, double p2p_rate) {
  config().h2d_rate = h2d_rate;
  config().d2h_rate = d2h_rate;
  config().p2p_rate = p2p_rate;
}

VGPU_API void vgpu_set_timing(double delay_us, double slowdown, double jitter_us, uint64_t seed) {
  config().delay_us = delay_us;
  config().slowdown = slowdown;
  config().jitter_us = jitter_us;
  config().jitter_seed = seed;
}

// For workers that have not started yet.
VGPU_API void vgpu_set_num_threads(int num_threads) { config().num_threads = num_threads; }

VGPU_API int vgpu_device_count() { return config().count; }
VGPU_API uint64_t vgpu_memory_nbytes() { return config().memory_nbytes; }
VGPU_API uint64_t vgpu_live_nbytes() { return live_nbytes(); }
VGPU_API int vgpu_in_forked_child() { return in_forked_child(); }
VGPU_API void vgpu_shutdown() { stop_all_streams(); }

// Makes a stream stand still until released, so that tests need not race against it.
VGPU_API void* vgpu_hold(int device, int64_t stream) {
  auto* gate = new RecordingPtr(std::make_shared<Recording>(nullptr, 0));
  get_stream(device, stream).enqueue([gate = *gate] { gate->wait(); }, "held", {});
  return gate;
}
VGPU_API void vgpu_release(void* gate) {
  auto* recording = static_cast<RecordingPtr*>(gate);
  (*recording)->set_done();
  delete recording;
}

// directions: 0 h2d, 1 d2h, 2 sent to peers, 3 received from peers
VGPU_API uint64_t vgpu_link_nbytes(int device, int direction) {
  return link_nbytes(device, static_cast<Direction>(direction));
}
VGPU_API void vgpu_reset_link_counters() { reset_link_counters(); }

VGPU_API const char* vgpu_host_register(void* pointer, uint64_t nbytes) {
  return error_text(host_register(static_cast<char*>(pointer), nbytes));
}
VGPU_API const char* vgpu_host_unregister(void* pointer) {
  return error_text(host_unregister(static_cast<char*>(pointer)));
}
