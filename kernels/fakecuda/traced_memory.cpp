// What PyTorch's own allocators do goes to the access trace: the runtime below sees only the
// segments that they take, not the blocks that they hand out.
#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <array>
#include <atomic>

#include "tracing.h"

extern "C" int64_t fakecuda_stream_number(void* stream);
extern "C" void fakecuda_trace_with(fakecuda::TraceHook hook);

namespace vgpu {

namespace {

using c10::CachingDeviceAllocator::TraceEntry;

void trace_hook(Kind kind, int device, int64_t stream, int64_t aux, const char* what,
                const Accesses& accesses) {
  trace::adopt_host_thread();
  trace::add(kind, device, stream, aux, what, accesses);
}

void host_turn(int64_t token) {
  trace::add(Kind::HostAcquire, -1, -1, token);
  trace::add(Kind::HostRelease, -1, -1, token);
}

// PyTorch calls this under its allocator's lock. Who gets a block waits for nothing where the same
// stream gave it up. Where other streams used it (record_stream) some thread has seen their events
// before the block counts as free, and whoever gets it comes after that thread.
void trace_block(const TraceEntry& entry) {
  static std::array<size_t, C10_COMPILE_TIME_MAX_GPUS> given_up{};
  int device = entry.device_;
  int64_t token = fakecuda::kDeviceAllocator - device;
  auto add = [&](Kind kind) {
    trace::add(kind, device, fakecuda_stream_number(entry.stream_), 0, {},
               {{entry.addr_, entry.size_, true}});
  };
  switch (entry.action_) {
    case TraceEntry::ALLOC:
      trace::adopt_host_thread();
      trace::add(Kind::HostAcquire, -1, -1, token);
      return add(Kind::Alloc);
    case TraceEntry::FREE_REQUESTED:
      given_up[device] = entry.addr_;
      return add(Kind::Free);
    case TraceEntry::FREE_COMPLETED:
      if (given_up[device] != entry.addr_) host_turn(token);
      given_up[device] = 0;
      return;
    default:
      return;
  }
}

// PyTorch's allocator of pinned memory, with blocks that go to the trace. Whoever gets a block that
// another thread gave back, or whose events another thread has seen, comes after that thread.
class TracedHostAllocator final : public at::HostAllocator {
 public:
  explicit TracedHostAllocator(at::HostAllocator* inner) : inner_(inner) {}

  at::DataPtr allocate(size_t nbytes) override {
    auto block = inner_->allocate(nbytes);
    if (!block) return block;
    trace::adopt_host_thread();
    host_turn(fakecuda::kHostAllocator);
    uint64_t address = reinterpret_cast<uint64_t>(block.get());
    trace::add(Kind::Alloc, -1, -1, 0, {}, {{address, nbytes, true}});
    inner_deleter() = block.get_deleter();  // all blocks have the same one
    TORCH_INTERNAL_ASSERT(block.compare_exchange_deleter(block.get_deleter(), &give_back));
    return block;
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    inner_->copy_data(to, from, nbytes);
  }
  bool record_event(void* pointer, void* context, c10::Stream stream) override {
    return inner_->record_event(pointer, context, stream);
  }
  void empty_cache() override { inner_->empty_cache(); }
  at::HostStats get_stats() override { return inner_->get_stats(); }
  void reset_accumulated_stats() override { inner_->reset_accumulated_stats(); }
  void reset_peak_stats() override { inner_->reset_peak_stats(); }

 private:
  static std::atomic<at::DeleterFnPtr>& inner_deleter() {
    static std::atomic<at::DeleterFnPtr> deleter{nullptr};
    return deleter;
  }
  static void give_back(void* context) {
    host_turn(fakecuda::kHostAllocator);
    inner_deleter().load()(context);
  }

  at::HostAllocator* inner_;
};

}  // namespace

// Called once, after PyTorch has set up CUDA.
void trace_runtime_and_allocators() {
  fakecuda_trace_with(trace_hook);
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(trace_block);
  static TracedHostAllocator pinned(at::getHostAllocator(kDeviceType));
  constexpr uint8_t kOverPyTorchs = 1;
  at::setHostAllocator(kDeviceType, &pinned, kOverPyTorchs);
}

}  // namespace vgpu
