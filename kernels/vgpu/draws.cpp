// Random operators: drawn on the host, by the CPU kernel, from a generator of the device.
#include <ATen/ops/empty_strided.h>

#include "random.h"
#include "storage.h"

namespace vgpu {

namespace {

// Draws into a tensor on the host, then copies it to the device behind what is enqueued there.
void run_fill(const c10::OperatorHandle& op, const OpInfo& info, Stack arguments, int device,
              Stack* stack) {
  size_t target_index = info.returned_argument[0];
  at::Tensor target = arguments[target_index].toTensor();
  if (info.name == "aten::randperm.generator_out")
    resize_tensor(target, {arguments[0].toInt()}, std::nullopt);
  at::Tensor drawn = at::empty_strided(target.sizes(), target.strides(), target.scalar_type());
  arguments[target_index] = drawn;
  op.callBoxed(&arguments);
  if (target.numel() > 0) {
    Accesses accesses;
    add_access(accesses, target, true);
    auto alias = host_alias(target);
    submit(device, info.name, accesses, [alias, drawn] { alias.copy_(drawn); });
  }
  stack->emplace_back(target);
}

}  // namespace

void run_random(const c10::OperatorHandle& op, const Stack& arguments, int device, Stack* stack) {
  const OpInfo& info = op_info(op);
  Stack prepared = arguments;
  const auto& schema_arguments = op.schema().arguments();
  for (size_t i = 0; i < prepared.size(); ++i)
    if (schema_arguments[i].name() == "generator")
      prepared[i] = cpu_generator(prepared[i], device);
  if (info.is_fill) return run_fill(op, info, std::move(prepared), device, stack);
  // It reads tensors (probabilities, means): they must be there before anything is drawn.
  Accesses accesses;
  Stack results = to_cpu(info, prepared, accesses);
  submit(device, info.name, accesses, [] {});
  wait_for_current_stream(device);
  op.callBoxed(&results);
  push_results(info, arguments, std::move(results), device, stack);
}

}  // namespace vgpu
