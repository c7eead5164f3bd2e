// Autocast: exactly CPU's casts. The list of operators is read from the dispatcher, which knows
// what CPU autocast covers; only what makes an operator run in the lower precision is named here.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>

#include "fallback.h"

namespace vgpu {

namespace {

enum class Policy { Lower, Float32, Promote };

Policy policy_of(const std::string& name) {
  static const std::unordered_set<std::string> lower = {
      "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::bmm", "aten::mm",
      "aten::linalg_vecdot", "aten::baddbmm", "aten::addmm", "aten::_addmm_activation",
      "aten::addbmm", "aten::linear", "aten::_convolution", "aten::matmul", "aten::conv_tbc",
      "aten::mkldnn_rnn_layer", "aten::conv_transpose1d", "aten::conv_transpose2d",
      "aten::conv_transpose3d", "aten::prelu", "aten::scaled_dot_product_attention",
      "aten::_native_multi_head_attention",
  };
  static const std::unordered_set<std::string> promote = {
      "aten::stack", "aten::cat", "aten::index_copy",
  };
  if (lower.count(name)) return Policy::Lower;
  return promote.count(name) ? Policy::Promote : Policy::Float32;
}

at::ScalarType widest_type(const Stack& arguments, at::ScalarType lowest) {
  at::ScalarType widest = lowest;
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (t.defined() && at::autocast::is_eligible(t, c10::kPrivateUse1))
        widest = at::autocast::prioritize(widest, t, c10::kPrivateUse1);
    });
  return widest;
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet /*keys*/, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  Stack arguments = torch::jit::pop(*stack, op.schema().arguments().size());
  at::ScalarType lower = at::autocast::get_autocast_dtype(c10::kPrivateUse1);
  at::ScalarType target = at::kFloat;
  switch (policy_of(op.schema().name())) {
    case Policy::Lower: target = lower; break;
    case Policy::Promote: target = widest_type(arguments, lower); break;
    case Policy::Float32: break;
  }
  for (auto& value : arguments)
    stack->push_back(map_tensors(value, [&](const at::Tensor& t) {
      return t.defined() ? at::autocast::cached_cast(target, t, c10::kPrivateUse1) : t;
    }));
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) != 0) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::AutocastCPU)) continue;
    std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    m.impl(full.c_str() + 6, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

}  // namespace
}  // namespace vgpu
