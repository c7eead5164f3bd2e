// What PyTorch asks a device: current device and stream, events, generators, pinned memory.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"
#include "pinned.h"
#include "random.h"
#include "storage.h"
#include "stream.h"

namespace vgpu {

namespace {

c10::Device make_device(int index) {
  return c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(index));
}
int index_or_current(c10::Device device) {
  return device.index() < 0 ? current_device() : device.index();
}
c10::Stream make_stream(int device, int64_t id) {
  return c10::Stream(c10::Stream::UNSAFE, make_device(device), id);
}
VStream& stream_of(const c10::Stream& stream) {
  return get_stream(stream.device_index(), stream.id());
}

// Behind PyTorch's opaque event pointer.
struct Event {
  RecordingPtr last;  // null until recorded
  bool has_timing;
};

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kPrivateUse1; }

  c10::Device exchangeDevice(c10::Device device) const override {
    int old = current_device();
    if (device.index() >= 0 && device.index() != old) set_current_device(device.index());
    return make_device(old);
  }
  c10::Device getDevice() const override { return make_device(current_device()); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < config().count) set_current_device(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(config().count);
  }
  c10::DeviceCapability getDeviceCapability(c10::Device /*device*/) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override {
    int index = index_or_current(device);
    return make_stream(index, current_stream_id(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return make_stream(index_or_current(device), 0);
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
    int index = index_or_current(device);
    return make_stream(index, next_pool_stream(index));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*high*/) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    int index = stream.device_index();
    int64_t old = current_stream_id(index);
    set_current_stream_id(index, stream.id());
    return make_stream(index, old);
  }
  bool queryStream(const c10::Stream& stream) const override {
    return stream_of(stream).is_done();
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    stream_of(stream).synchronize();
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    synchronize_device(device < 0 ? current_device() : device);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex /*device*/,
              const c10::EventFlag flag) const override {
    bool has_timing = flag == c10::EventFlag::BACKEND_DEFAULT;
    if (!*event) *event = new Event{nullptr, has_timing};
    static_cast<Event*>(*event)->last = stream_of(stream).record();
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (auto recording = last_recording(event)) stream_of(stream).wait(recording);
  }
  bool queryEvent(void* event) const override {
    auto recording = last_recording(event);
    if (!recording) return true;
    bool is_done = recording->is_done();
    if (is_done) trace::add(Kind::EventSync, -1, -1, recording->id);  // the host may rely on it
    return is_done;
  }
  void synchronizeEvent(void* event) const override {
    check_not_forked();
    auto recording = last_recording(event);
    if (!recording) return;
    recording->wait();
    trace::add(Kind::EventSync, -1, -1, recording->id);
  }
  void destroyEvent(void* event, const c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex /*device*/) const override {
    auto begin = last_recording(a), end = last_recording(b);
    TORCH_CHECK(begin && end, "Both events must be recorded before calculating elapsed time.");
    TORCH_CHECK(static_cast<Event*>(a)->has_timing && static_cast<Event*>(b)->has_timing,
                "Both events must be created with argument 'enable_timing=True'.");
    TORCH_CHECK(begin->is_done() && end->is_done(),
                "Both events must be completed before calculating elapsed time.");
    return std::chrono::duration<double, std::milli>(end->time() - begin->time()).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    device_allocator().recordStream(data, stream);
  }

 private:
  static RecordingPtr last_recording(void* event) {
    return event ? static_cast<Event*>(event)->last : nullptr;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return config().count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override { return true; }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(config().count);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current_device());
  }
  void setCurrentDevice(c10::DeviceIndex device) const override { set_current_device(device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    int old = current_device();
    set_current_device(device);
    return static_cast<c10::DeviceIndex>(old);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  c10::Device getDeviceFromPtr(void* data) const override {
    int device = device_of_pointer(data);
    TORCH_CHECK(device >= 0, "The pointer does not belong to any virtual GPU");
    return make_device(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device < 0 ? current_device() : device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return make_generator(device < 0 ? current_device() : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    resize_storage(*storage.unsafeGetStorageImpl(), nbytes);
  }
};

const int g_hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return 0;
}();

}  // namespace
}  // namespace vgpu
