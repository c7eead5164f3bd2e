// Results: operators on the stand-in's GPUs are answered by PyTorch's CPU kernels over the same
// memory, which is the host's, on the thread of the stream. What finds the shapes of results,
// enqueues and draws is the virtual GPU's, compiled for the key CUDA; the allocator, streams,
// events, copies to and from the host, autograd and autocast are PyTorch's own for CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

#include <functional>
#include <map>
#include <mutex>
#include <unordered_set>

#define VGPU_DEVICE_TYPE c10::kCUDA
#include "../vgpu/trace.cpp"
#include "../vgpu/trace_capi.cpp"
#include "../vgpu/aliases.cpp"
#include "../vgpu/opinfo.cpp"
#include "../vgpu/shapes.cpp"
#include "../vgpu/draws.cpp"
#include "../vgpu/dropout.cpp"
#include "../vgpu/rnn.cpp"
#include "../vgpu/fallback.cpp"
#include "traced_memory.cpp"

extern "C" void omp_set_num_threads(int) __attribute__((weak));
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

// The stand-in's runtime (streams.cpp, launch.cpp).
extern "C" int fakecuda_enqueue(void* stream, void (*run)(void*), void* argument,
                                const char* what, const vgpu::Accesses& accesses);
extern "C" void fakecuda_wait(void* stream);
extern "C" void fakecuda_kernel_failed(const char* why);
extern "C" void fakecuda_load(const char* kernel);
extern "C" void fakecuda_refuse_unanswered();

namespace vgpu {

// ---- what the fallback asks of a device

at::Tensor make_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::empty_strided(sizes, strides, at::TensorOptions(dtype).device(at::kCUDA));
}

const at::Tensor& resize_tensor(const at::Tensor& self, at::IntArrayRef sizes,
                                std::optional<at::MemoryFormat> format) {
  return self.resize_(sizes, format);
}

int current_device() { return c10::impl::VirtualGuardImpl(kDeviceType).getDevice().index(); }

namespace {

void* current_stream_handle(int device) {
  auto index = static_cast<c10::DeviceIndex>(device);
  auto stream = c10::impl::VirtualGuardImpl(kDeviceType).getStream({kDeviceType, index});
  return stream.native_handle();
}

struct Kernel {
  std::string name;
  std::function<void()> run;
  bool has_grad;  // oneDNN chooses by it
};

// As everywhere one thread computes: the order of a sum depends on how many do.
void use_one_thread() {
  static thread_local bool done = false;
  if (done) return;
  done = true;
  at::get_num_threads();  // ATen sets its count on first use and would undo ours
  if (omp_set_num_threads) omp_set_num_threads(1);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
}

void run_kernel(void* argument) {
  std::unique_ptr<Kernel> kernel(static_cast<Kernel*>(argument));
  use_one_thread();
  try {
    at::AutoGradMode mode(kernel->has_grad);
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    kernel->run();
  } catch (const std::exception& error) {
    fakecuda_kernel_failed((kernel->name + ": " + error.what()).c_str());
  }
}

}  // namespace

void submit(int device, const std::string& what, const Accesses& accesses,
            std::function<void()> run) {
  fakecuda_load(what.c_str());
  auto* kernel = new Kernel{what, std::move(run), at::GradMode::is_enabled()};
  int error = fakecuda_enqueue(current_stream_handle(device), run_kernel, kernel, what.c_str(),
                               accesses);
  // As PyTorch does behind each launch: an error that an earlier call has left is found here, too.
  int left = cudaGetLastError();
  if (error) delete kernel;
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
  C10_CUDA_CHECK(static_cast<cudaError_t>(left));
}

void wait_for_current_stream(int device) { fakecuda_wait(current_stream_handle(device)); }

// The sequences of the CPU's generators, by seed. A place in one is remembered for each offset that
// was reached, since a state that is set again must give the same draws; an offset that was never
// reached begins a sequence of its own.
class Sequences {
 public:
  // The generator that stands at `offset`. With what the caller draws from it, it stands at `next`.
  at::Generator take(uint64_t seed, uint64_t offset, uint64_t next) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (reached_.size() >= kMaxReached) reached_.clear();
    auto found = reached_.find({seed, offset});
    at::Generator generator =
        offset > 0 && found != reached_.end()
            ? found->second.clone()
            : at::detail::createCPUGenerator(seed ^ (offset * 0x9E3779B97F4A7C15ull));
    reached_.insert_or_assign({seed, next}, generator);
    return generator;
  }

 private:
  static constexpr size_t kMaxReached = 20000;  // of 5 KB each
  std::mutex mutex_;
  std::map<std::pair<uint64_t, uint64_t>, at::Generator> reached_;
};

Sequences& sequences() {
  static auto* all = new Sequences();
  return *all;
}

// Draws are the CPU's from the same seed; states, as seed and offset, are CUDA's.
at::Generator cpu_generator(const c10::IValue& value, int device) {
  constexpr uint64_t kOffsetOfADraw = 4;
  auto index = static_cast<c10::DeviceIndex>(device);
  at::Generator given = value.isNone()
                            ? at::globalContext().defaultGenerator({kDeviceType, index})
                            : value.toGenerator();
  TORCH_CHECK(given.device().type() == kDeviceType,
              "Expected a 'cuda' device type for generator but found '", given.device().type(),
              "'");
  std::lock_guard<std::mutex> lock(given.mutex());
  uint64_t seed = given.current_seed(), offset = given.get_offset();
  given.set_offset(offset + kOffsetOfADraw);
  return sequences().take(seed, offset, offset + kOffsetOfADraw);
}

// ---- sparse and nested tensors are not imitated

at::Tensor host_alias_of_parts(const at::Tensor& t, bool, Accesses&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "the stand-in for CUDA has dense tensors only, not ",
                              t.layout());
}

at::Tensor upload(const at::Tensor& t, int device, const std::string& what) {
  TORCH_CHECK_NOT_IMPLEMENTED(is_dense(t), "the stand-in for CUDA has dense tensors only");
  at::Tensor result = make_tensor(t.sizes(), t.strides(), t.scalar_type());
  if (t.is_conj()) result._set_conj(true);
  if (t.is_neg()) result._set_neg(true);
  Accesses accesses;
  add_access(accesses, result, true);
  if (t.numel() > 0)
    submit(device, what, accesses, [alias = host_alias(result), t] { alias.copy_(t); });
  return result;
}

namespace {

// ---- operators with an answer of their own

// One that CUDA makes of the bytes as they lie.
bool is_plain_copy(const at::Tensor& to, const at::Tensor& from) {
  bool same_order = (to.is_contiguous() && from.is_contiguous()) ||
                    (to.strides().equals(from.strides()) && to.is_non_overlapping_and_dense());
  return to.scalar_type() == from.scalar_type() && to.sizes().equals(from.sizes()) &&
         same_order && to.is_conj() == from.is_conj() && to.is_neg() == from.is_neg();
}

// PyTorch's own, but for what it would launch a kernel for: a copy on the device that changes the
// type or the order of elements.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  bool stays = is_vgpu(self) && is_vgpu(source);
  if (!stays || is_plain_copy(self, source))
    return at::native::copy_(self, source, non_blocking);
  if (self.device() != source.device()) {
    // The elements get type and order where they are; then bytes are copied.
    c10::DeviceGuard guard(source.device());
    auto there = at::empty(self.sizes(), self.options().device(source.device()));
    there.copy_(source);
    auto here = at::empty(self.sizes(), self.options());
    at::native::copy_(here, there, non_blocking);
    return copy_(self, here, non_blocking);
  }
  if (self.numel() == 0) return self;
  c10::DeviceGuard guard(self.device());
  Accesses accesses;
  add_access(accesses, source, false);
  add_access(accesses, self, true);
  submit(self.device().index(), "copy_", accesses,
         [to = host_alias(self), from = host_alias(source)] { to.copy_(from); });
  return self;
}

// CUDA's fused dropout returns its mask, as this does.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p,
                                                  std::optional<bool> train) {
  if (!train.value_or(true))
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  double keep = 1 - p;
  auto mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(keep);
  return {input.mul(mask).mul_(keep == 0 ? 0.0 : 1.0 / keep), mask};
}

// CUDA counts integers, too; counts of either are integers that a double holds.
at::Tensor histc(const at::Tensor& input, int64_t bins, const at::Scalar& low,
                 const at::Scalar& high) {
  auto values = at::isIntegralType(input.scalar_type(), true) ? input.to(at::kDouble) : input;
  auto counts = at::empty({bins}, values.options());
  at::histc_out(counts, values, bins, low, high);
  return counts.to(input.scalar_type());
}

// Memory, views and transfers: PyTorch's own for CUDA, which launch no kernel.
const std::unordered_set<std::string> kKept = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::_copy_from",
    "aten::_copy_from_and_resize", "aten::record_stream", "aten::resize_", "aten::set_",
    "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor", "aten::_local_scalar_dense", "aten::is_set_to",
    "aten::is_pinned", "aten::_pin_memory", "aten::storage_offset",
};

// Composites that choose a kernel by the device, though CPU's choice is wanted.
const std::unordered_set<std::string> kComposites = {
    "aten::convolution", "aten::convolution_backward", "aten::mkldnn_rnn_layer",
    "aten::mkldnn_rnn_layer_backward",
};

const std::unordered_set<std::string> kAnsweredHere = {
    "aten::copy_", "aten::native_dropout", "aten::histc",
};

bool is_answered(const c10::OperatorHandle& op, const std::string& name) {
  if (kKept.count(name) || kAnsweredHere.count(name)) return false;
  if (kComposites.count(name)) return true;
  return op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
         op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU) && !op_info(op).is_view;
}

// ---- last bits that are not the CPU's, as a GPU's are

// Operators whose sums or series a GPU takes in another order, or in other steps.
const std::unordered_set<std::string> kOfOwnBits = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot",
    "aten::convolution", "aten::convolution_backward", "aten::native_layer_norm",
    "aten::native_layer_norm_backward", "aten::_softmax", "aten::_log_softmax", "aten::tanh",
    "aten::gelu", "aten::sigmoid", "aten::exp",
};

// Makes the last bit of each number one that its other bits decide: equal numbers stay equal, and
// it does not matter how often that is done.
template <class Bits>
void decide_last_bits(Bits* bits, int64_t count, Bits exponent) {
  for (int64_t i = 0; i < count; ++i) {
    Bits rest = bits[i] >> 1;
    bool is_finite = (bits[i] & exponent) != exponent;
    if (is_finite && (rest << 2)) bits[i] = rest << 1 | (__builtin_popcountll(rest) & 1);
  }
}

void give_own_bits(const at::Tensor& t) {
  bool is_known = t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
  if (!is_known || !is_vgpu(t) || !t.is_non_overlapping_and_dense() || t.numel() == 0) return;
  c10::DeviceGuard guard(t.device());  // a default stream is that of the current device
  Accesses accesses;
  add_access(accesses, t, true);
  submit(t.device().index(), "own bits", accesses, [alias = host_alias(t)] {
    void* data = alias.data_ptr();
    if (alias.scalar_type() == at::kFloat)
      decide_last_bits<uint32_t>(static_cast<uint32_t*>(data), alias.numel(), 0x7f800000u);
    else
      decide_last_bits<uint64_t>(static_cast<uint64_t*>(data), alias.numel(), 0x7ffull << 52);
  });
}

void fallback_of_own_bits(const c10::OperatorHandle& op, Stack* stack) {
  fallback(op, stack);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
    for_each_tensor((*stack)[i], [](const at::Tensor& t) {
      if (t.defined()) give_own_bits(t);
    });
}

struct Silent final : c10::WarningHandler {  // that kernels are replaced is what is wanted
  void process(const c10::Warning&) override {}
};

}  // namespace

}  // namespace vgpu

// Answers operators from now on; returns how many. Called once, after PyTorch has set up CUDA.
extern "C" __attribute__((visibility("default"))) int fakecuda_install() {
  using namespace vgpu;
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static torch::Library library(torch::Library::IMPL, "aten",
                                std::make_optional(c10::DispatchKey::CUDA), __FILE__, __LINE__);
  int count = 0;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) != 0) continue;
    std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (!is_answered(*op, full)) continue;
    library.impl(full.c_str() + strlen("aten::"),
                 torch::CppFunction::makeFromBoxedFunction<&fallback>());
    ++count;
  }
  library.impl("copy_", copy_);
  library.impl("native_dropout", native_dropout);
  library.impl("histc", histc);
  register_rnn(library);
  static torch::Library recorded(torch::Library::IMPL, "aten",
                                 std::make_optional(c10::DispatchKey::AutogradCUDA), __FILE__,
                                 __LINE__);
  register_rnn(recorded);
  // What only these have no kernel on the CPU: convolution and attention are CPU's kernels and the
  // formula, and so are their gradients.
  auto& context = at::globalContext();
  context.setUserEnabledCuDNN(false);
  context.setSDPUseFlash(false);
  context.setSDPUseMemEfficient(false);
  context.setSDPUseCuDNN(false);
  fakecuda_refuse_unanswered();
  trace_runtime_and_allocators();
  return count;
}

// Whether composites are taken apart as for the CPU, so that its results are bit for bit what the
// stand-in computes, instead of as for CUDA: dropout, so far.
extern "C" __attribute__((visibility("default"))) void fakecuda_decompose_as_cpu(bool on) {
  using namespace vgpu;
  static std::vector<std::unique_ptr<torch::Library>> libraries;
  libraries.clear();
  if (!on) return;
  for (auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA}) {
    libraries.push_back(std::make_unique<torch::Library>(
        torch::Library::IMPL, "aten", std::make_optional(key), __FILE__, __LINE__));
    libraries.back()->impl("dropout", dropout);
  }
}

// Whether products, sums and series have last bits that are not the CPU's, as on a GPU: what is
// then compared with the CPU bit for bit fails.
extern "C" __attribute__((visibility("default"))) void fakecuda_own_bits(bool on) {
  using namespace vgpu;
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static std::unique_ptr<torch::Library> library;
  library.reset();
  if (!on) return;
  library = std::make_unique<torch::Library>(
      torch::Library::IMPL, "aten", std::make_optional(c10::DispatchKey::CUDA), __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (op && kOfOwnBits.count(name.name) && is_answered(*op, full))
      library->impl(full.c_str() + strlen("aten::"),
                    torch::CppFunction::makeFromBoxedFunction<&fallback_of_own_bits>());
  }
}
