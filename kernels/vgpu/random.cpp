#include "random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/library.h>

#include <array>

#include "storage.h"

namespace vgpu {

namespace {

// Wraps a CPU generator, so that seeds, states and draws are CPU's own and states can be
// exchanged with CPU. (A subclass would not do: CPU kernels look at the device.)
class Generator final : public c10::GeneratorImpl {
 public:
  Generator(int device, at::Generator cpu)
      : GeneratorImpl(c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device)),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(std::move(cpu)) {}

  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }

  at::Generator cpu;

 private:
  Generator* clone_impl() const override { return new Generator(device().index(), cpu.clone()); }
};

}  // namespace

at::Generator cpu_generator(const c10::IValue& value, int device) {
  at::Generator given = value.isNone() ? default_generator(device) : value.toGenerator();
  TORCH_CHECK(given.device().is_privateuseone(),
              "Expected a 'vgpu' device type for generator but found '", given.device().type(),
              "'");
  return static_cast<Generator*>(given.unsafeGetGeneratorImpl())->cpu;
}

at::Generator make_generator(int device) {
  return at::make_generator<Generator>(device, at::detail::createCPUGenerator());
}

const at::Generator& default_generator(int device) {
  static auto* all = [] {
    auto* generators = new std::array<at::Generator, kMaxDevices>();
    for (int i = 0; i < kMaxDevices; ++i) (*generators)[i] = make_generator(i);
    return generators;
  }();
  return (*all)[device];
}

// Python has no other way to reach the default generators: torch.vgpu.default_generators.
TORCH_LIBRARY(vgpu, m) {
  m.def("default_generator(int device) -> Generator?",
        [](int64_t device) { return default_generator(static_cast<int>(device)); });
}

}  // namespace vgpu
