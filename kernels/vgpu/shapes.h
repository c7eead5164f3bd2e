// Output geometry of operators, from their Meta kernels, remembered for each argument geometry.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <memory>
#include <vector>

#include "fallback.h"

namespace vgpu {

struct Geometry {
  bool is_defined = false;
  c10::DimVector sizes, strides;
  at::ScalarType dtype = at::kFloat;
};

struct OutputPlan {
  struct Result {
    bool is_list = false;
    std::vector<Geometry> tensors;
  };
  std::vector<Result> results;  // one for each return; empty for those that are arguments
  std::vector<Geometry> outs;   // one for each argument; defined for an `out=` of another shape
  bool all_defined = true;
  // False where the Meta kernel's strides may not be the CPU kernel's: the first run tells.
  bool is_certain = true;
};

// Null if only running the operator can tell. Resizes `out=` arguments that have another shape,
// if the plan is certain.
// An operator whose Meta kernel is wrong has a plan once `remember_outputs` was called.
std::shared_ptr<const OutputPlan> plan_outputs(const c10::OperatorHandle& op, const OpInfo& info,
                                               const Stack& arguments);

// Plans these results of a run on the CPU for all later calls with such arguments. `guess` is what
// the Meta kernel said; sizes other than those depend on more than the geometry of the arguments.
// `outs` are what the kernel made of `out=` arguments, by argument, before those are resized.
void remember_outputs(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
                      const Stack& cpu_results, const std::vector<at::Tensor>& outs,
                      const OutputPlan* guess);

// Gives a tensor a shape, and as CPU kernels do for `out=` the strides of their choice.
void reshape_output(const at::Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides);

}  // namespace vgpu
