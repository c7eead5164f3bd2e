#include "fallback.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "layouts.h"
#include "random.h"
#include "shapes.h"
#include "storage.h"
#include "stream.h"

namespace vgpu {

namespace {

// Kernels run later, so a host operand must not change after the call: copy it (it is small).
// Wrapped numbers, the `2` of `x * 2`, are out of the user's reach.
at::Tensor to_cpu(const at::Tensor& t, bool is_written, Accesses& accesses) {
  if (!t.defined()) return t;
  if (!is_vgpu(t)) {
    bool is_safe = is_written || t.unsafeGetTensorImpl()->is_wrapped_number();
    return t.device().is_cpu() && !is_safe ? t.clone() : t;
  }
  if (!is_dense(t)) return host_alias_of_parts(t, is_written, accesses);
  add_access(accesses, t, is_written);
  return host_alias(t);
}

// A view as PyTorch makes it on the CPU, transferred to the device tensor: no data is touched.
void run_view(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
              Stack* stack) {
  at::Tensor base;
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (!base.defined() && is_vgpu(t)) base = t;
    });
  Accesses none;
  Stack results = to_cpu(info, arguments, none);
  op.callBoxed(&results);
  for (const auto& result : results)
    stack->push_back(map_tensors(result, [&](const at::Tensor& t) {
      TORCH_CHECK_NOT_IMPLEMENTED(t.scalar_type() == base.scalar_type(), info.name,
                                  " is not implemented for vgpu");
      return at::as_strided(base, t.sizes(), t.strides(), t.storage_offset());
    }));
}

struct Outputs {
  std::vector<c10::IValue> device;  // what the caller gets
  std::vector<at::Tensor> aliases;  // the same memory for the CPU kernel, in order, flat
};

Outputs allocate(const OutputPlan& plan, const OpInfo& info, const Stack& arguments,
                 Accesses& accesses) {
  Outputs outputs;
  for (size_t i = 0; i < plan.results.size(); ++i) {
    if (info.returned_argument[i] >= 0) {
      outputs.device.push_back(arguments[info.returned_argument[i]]);
      continue;
    }
    c10::List<at::Tensor> made;
    for (const auto& g : plan.results[i].tensors) {
      at::Tensor t = g.is_defined ? make_tensor(g.sizes, g.strides, g.dtype) : at::Tensor();
      if (g.is_defined) add_access(accesses, t, true);
      outputs.aliases.push_back(g.is_defined ? host_alias(t) : at::Tensor());
      made.push_back(t);
    }
    if (plan.results[i].is_list)
      outputs.device.emplace_back(made);
    else
      outputs.device.emplace_back(made.get(0));
  }
  return outputs;
}

void copy_result(const OpInfo& info, const at::Tensor& to, const at::Tensor& from) {
  if (!to.defined()) return;
  TORCH_CHECK(from.defined() && from.sizes().equals(to.sizes()), "vgpu: ", info.name, " gave ",
              from.defined() ? from.sizes() : at::IntArrayRef{}, " where its Meta kernel says ",
              to.sizes());
  if (to.numel()) to.copy_(from);
}

void copy_results(const OpInfo& info, const std::vector<at::Tensor>& to, const Stack& from) {
  size_t next = 0;
  for (size_t i = 0; i < from.size(); ++i)
    if (info.returned_argument[i] < 0)
      for_each_tensor(from[i], [&](const at::Tensor& t) { copy_result(info, to[next++], t); });
}

Stack order_for_out_variant(const OpInfo& info, const Stack& cpu_arguments,
                            const std::vector<at::Tensor>& outputs) {
  Stack ordered;
  for (int index : info.out_order)
    ordered.push_back(index >= 0 ? cpu_arguments[index] : c10::IValue(outputs[-1 - index]));
  return ordered;
}

void run_async(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
               const OutputPlan& plan, int device, Stack* stack) {
  Accesses accesses;
  Stack cpu_arguments = to_cpu(info, arguments, accesses);
  Outputs outputs = allocate(plan, info, arguments, accesses);
  if (info.out_op && plan.all_defined) {
    Stack ordered = order_for_out_variant(info, cpu_arguments, outputs.aliases);
    submit(device, info.name, accesses,
           [out_op = *info.out_op, ordered]() mutable { out_op.callBoxed(&ordered); });
  } else {
    submit(device, info.name, accesses,
           [op, &info, cpu_arguments, aliases = std::move(outputs.aliases)]() mutable {
             op.callBoxed(&cpu_arguments);
             copy_results(info, aliases, cpu_arguments);
           });
  }
  for (auto& value : outputs.device) stack->push_back(std::move(value));
}

// An `out=` of unknown shape: the kernel resizes a tensor on the host, which is then copied.
void copy_to_output(const OpInfo& info, const at::Tensor& output, const at::Tensor& result,
                    int device) {
  reshape_output(output, result.sizes(), result.strides());
  Accesses accesses;
  add_access(accesses, output, true);
  submit(device, info.name, accesses,
         [to = host_alias(output), result] { to.copy_(result); });
}

// Data-dependent results: run on the stream like everything, but wait to learn their shapes.
// `guess` is a plan that may be wrong, or null.
void run_sync(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
              const OutputPlan* guess, int device, Stack* stack) {
  Accesses accesses;
  auto results = std::make_shared<Stack>(to_cpu(info, arguments, accesses));
  auto is_vgpu_output = [&](size_t i) {
    return info.is_out[i] && arguments[i].isTensor() && is_vgpu(arguments[i].toTensor());
  };
  std::vector<std::pair<at::Tensor, at::Tensor>> outputs;
  std::vector<at::Tensor> outs(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!is_vgpu_output(i)) continue;
    at::Tensor output = arguments[i].toTensor();
    at::Tensor fresh = at::empty({0}, output.options().device(at::kCPU));
    outputs.emplace_back(output, fresh);
    outs[i] = fresh;
    (*results)[i] = fresh;
  }
  submit(device, info.name, accesses, [op, results] { op.callBoxed(results.get()); });
  wait_for_current_stream(device);
  if (guess || (info.has_wrong_meta && outputs.empty()))
    remember_outputs(op, info, arguments, *results, outs, guess);
  for (const auto& [output, result] : outputs) copy_to_output(info, output, result, device);
  push_results(info, arguments, std::move(*results), device, stack);
}

}  // namespace

int find_device(const OpInfo& info, const Stack& arguments) {
  int device = -1;
  bool has_host_tensor = false;
  for (const auto& value : arguments) {
    if (value.isDevice() && value.toDevice().type() == kDeviceType && device < 0)
      device = value.toDevice().index();
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (!t.defined()) return;
      if (!is_vgpu(t)) {
        has_host_tensor |= t.dim() > 0 && t.device().is_cpu();
        return;
      }
      int other = t.device().index();
      TORCH_CHECK(device < 0 || device == other,
                  "Expected all tensors to be on the same device, but found at least two devices,"
                  " vgpu:", device, " and vgpu:", other, "! (when running ", info.name, ")");
      device = other;
    });
  }
  TORCH_CHECK(device < 0 || !has_host_tensor || info.takes_host_tensors,
              "Expected all tensors to be on the same device, but found at least two devices, "
              "vgpu:", device, " and cpu! (when running ", info.name, ")");
  return device < 0 ? current_device() : device;
}

Stack to_cpu(const OpInfo& info, const Stack& arguments, Accesses& accesses) {
  Stack converted;
  converted.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    if (value.isDevice())
      converted.emplace_back(c10::Device(c10::kCPU));
    else
      converted.push_back(map_tensors(value, [&](const at::Tensor& t) {
        return to_cpu(t, info.is_written[i], accesses);
      }));
  }
  return converted;
}

void push_results(const OpInfo& info, const Stack& arguments, Stack cpu_results, int device,
                  Stack* stack) {
  for (size_t i = 0; i < cpu_results.size(); ++i) {
    if (info.returned_argument[i] >= 0) {
      stack->push_back(arguments[info.returned_argument[i]]);
      continue;
    }
    stack->push_back(map_tensors(cpu_results[i], [&](const at::Tensor& t) {
      return !t.defined() ? t : upload(t, device, info.name);
    }));
  }
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const OpInfo& info = op_info(op);
  TORCH_CHECK_NOT_IMPLEMENTED(
      op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), "vgpu: ", info.name,
      " has no CPU kernel, and the virtual GPU computes with CPU kernels. Use an operator that CPU"
      " has, or register a CPU kernel for this one with torch.library.impl().");
  Stack arguments = torch::jit::pop(*stack, info.is_written.size());
  int device = find_device(info, arguments);
  c10::DeviceGuard guard(c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(device)));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (info.is_random) return run_random(op, arguments, device, stack);
  if (info.is_view) return run_view(op, info, arguments, stack);
  std::shared_ptr<const OutputPlan> plan;
  if (!info.must_measure) plan = plan_outputs(op, info, arguments);
  if (plan && plan->is_certain) return run_async(op, info, arguments, *plan, device, stack);
  run_sync(op, info, arguments, plan.get(), device, stack);
}

}  // namespace vgpu
