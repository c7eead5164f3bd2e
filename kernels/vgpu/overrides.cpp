// Operators that the fallback cannot serve: memory, views, and composites that choose by device.
#include <ATen/ATen.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_set>

#include "fallback.h"
#include "memory.h"
#include "storage.h"
#include "stream.h"

namespace vgpu {

namespace {

using OptDtype = std::optional<at::ScalarType>;
using OptLayout = std::optional<at::Layout>;
using OptDevice = std::optional<at::Device>;
using OptBool = std::optional<bool>;
using OptFormat = std::optional<at::MemoryFormat>;

// ---- memory

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, OptDtype dtype,
                         OptLayout, OptDevice device, OptBool pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.value_or(at::Device(c10::kPrivateUse1)));
  return make_tensor(sizes, strides, c10::dtype_or_default(dtype));
}

at::Tensor empty(at::IntArrayRef sizes, OptDtype dtype, OptLayout, OptDevice device, OptBool pin,
                 OptFormat format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(device.value_or(at::Device(c10::kPrivateUse1)));
  return at::detail::empty_generic(sizes, &device_allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset,
                        at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, sizes, strides);
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  return at::native::set_(self, std::move(storage));
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  device_allocator().recordStream(self.storage().data_ptr(), stream);
}

// Whether `tensor.data = other` may put a tensor of another device into this one, as between CPU
// and CUDA: `module.to()` then keeps its parameters, and with them those that are tied.
bool has_compatible_type(const at::Tensor& self, const at::Tensor& from) {
  auto is_plain = [](const at::Tensor& t) {
    auto keys = t.key_set();
    return keys.has_any(c10::DispatchKeySet(c10::DispatchKey::Dense)) &&
           !keys.has(c10::DispatchKey::Python) && (is_vgpu(t) || t.device().is_cpu());
  };
  return (is_plain(self) && is_plain(from)) ||
         self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}

// ---- random composites

// CPU's native_dropout, with the mask drawn from the device's generator.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double p,
                                                  OptBool train) {
  if (!train.value_or(true))
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  double keep = 1 - p;
  auto mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(keep);
  auto output = input.mul(mask).mul_(keep == 0 ? 0.0 : 1.0 / keep);
  return {output, mask};
}

// ---- attention

at::Tensor cpu_probe(const at::Tensor& t) {
  auto alias = host_alias(t);
  if (t.requires_grad()) alias.set_requires_grad(true);
  return alias;
}

// An additive mask, as PyTorch's own function makes it from a boolean one.
std::optional<at::Tensor> additive_mask(const std::optional<at::Tensor>& mask,
                                        at::ScalarType dtype) {
  if (!mask || mask->scalar_type() != at::kBool) return mask;
  auto additive = at::zeros_like(*mask, mask->options().dtype(dtype));
  return additive.masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
}

// PyTorch knows only the slow formula for PrivateUse1. Ask what it would choose for CPU tensors
// like these, and do that.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout_p, bool is_causal,
                     std::optional<double> scale, bool enable_gqa) {
  std::optional<at::Tensor> mask_probe;
  if (mask && mask->defined()) mask_probe = cpu_probe(*mask);
  int64_t choice =
      at::_fused_sdp_choice(cpu_probe(query), cpu_probe(key), cpu_probe(value), mask_probe,
                            dropout_p, is_causal, scale, enable_gqa);
  auto additive = additive_mask(mask, query.scalar_type());
  if (choice == static_cast<int64_t>(at::SDPBackend::flash_attention))
    return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, additive, scale));
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, additive, dropout_p, is_causal, std::nullopt, scale, enable_gqa));
}

// ---- convolution, by the names PyTorch has for foreign backends

at::Tensor convolution_overrideable(const at::Tensor& input, const at::Tensor& weight,
                                    const std::optional<at::Tensor>& bias,
                                    at::IntArrayRef stride, at::IntArrayRef padding,
                                    at::IntArrayRef dilation, bool transposed,
                                    at::IntArrayRef output_padding, int64_t groups) {
  return at::convolution(input, weight, bias, stride, padding, dilation, transposed,
                         output_padding, groups);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward_overrideable(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    at::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  at::OptionalIntArrayRef bias_sizes = at::IntArrayRef{};
  int64_t channels = grad.size(1);
  if (mask[2]) bias_sizes = at::IntArrayRef(&channels, 1);
  return at::convolution_backward(grad, input, weight, bias_sizes, stride, padding, dilation,
                                  transposed, output_padding, groups, mask);
}

// CUDA counts integers too, and models choose that branch for anything that is not a CPU.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min,
                 const at::Scalar& max) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::histc", "");
  bool is_float = at::isFloatingType(self.scalar_type());
  Stack stack{is_float ? self : self.to(at::kDouble), bins, min, max};
  fallback(op, &stack);
  at::Tensor counts = stack[0].toTensor();
  return is_float ? counts : counts.to(self.scalar_type());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_tensor);
  m.impl("record_stream", record_stream);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_type);
  m.impl("histc", histc);
  m.impl("native_dropout", native_dropout);
  m.impl("dropout", dropout);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("convolution_overrideable", convolution_overrideable);
  m.impl("convolution_backward_overrideable", convolution_backward_overrideable);
}

// Composites of differentiable operators: autograd must see those, not the composite.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_has_compatible_shallow_copy_type", has_compatible_type);
  m.impl("dropout", dropout);
  m.impl("scaled_dot_product_attention", attention);
}

// Operators for which the dispatcher would rather decompose than ask the fallback, though CPU has
// a kernel of its own, or chooses one by device. Same kernel, same bits.
bool prefers_fallback(const c10::OperatorHandle& op, const std::string& name) {
  static const std::unordered_set<std::string> composites_that_ask = {
      "aten::convolution", "aten::convolution_backward", "aten::linalg_lstsq", "aten::mode.values",
  };
  if (composites_that_ask.count(name)) return true;
  using c10::DispatchKey;
  if (!op.hasKernelForDispatchKey(DispatchKey::CPU)) return false;
  if (op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) || op_info(op).is_view) return false;
  return op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
         op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional);
}

void register_preferred(torch::Library& m) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) != 0) continue;
    std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (prefers_fallback(*op, full))
      m.impl(full.c_str() + strlen("aten::"),
             torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) { register_preferred(m); }

}  // namespace
}  // namespace vgpu
