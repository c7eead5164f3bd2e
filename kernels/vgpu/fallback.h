// The fallback: any operator runs as its CPU kernel on a stream's worker, over device memory.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>
#include <vector>

#include "trace.h"

namespace vgpu {

using Stack = torch::jit::Stack;

// What is fixed for an operator, found out once.
struct OpInfo {
  std::string name;        // "aten::add.Tensor"
  bool is_view = false;    // returns an alias of an argument
  bool is_random = false;  // draws from a generator
  bool is_fill = false;    // random, and reads no tensor: only overwrites
  bool must_measure = false;    // the output depends on data in a way the host has to know
  bool has_wrong_meta = false;  // the output's geometry is known after a first run
  bool takes_host_tensors = false;  // e.g. indices on the CPU are fine
  std::vector<bool> is_written;     // for each argument
  std::vector<bool> is_out;         // for each argument: named `out`, may be resized
  std::vector<int> returned_argument;  // for each return: index of the argument it is, or -1
  // The variant that writes into given outputs: its argument i is our argument out_order[i],
  // or output -1 - out_order[i] if negative.
  std::optional<c10::OperatorHandle> out_op;
  std::vector<int> out_order;
};

const OpInfo& op_info(const c10::OperatorHandle& op);

// The device the operator runs on. As on CUDA all tensors must be there, but numbers (tensors
// without dimensions) may be on the CPU.
int find_device(const OpInfo& info, const Stack& arguments);

// Arguments with every vgpu tensor replaced by a CPU alias; what they access goes to `accesses`.
Stack to_cpu(const OpInfo& info, const Stack& arguments, Accesses& accesses);

// Replaces CPU results by vgpu tensors (or by the arguments they are) and pushes them on `stack`.
void push_results(const OpInfo& info, const Stack& arguments, Stack cpu_results, int device,
                  Stack* stack);

void fallback(const c10::OperatorHandle& op, Stack* stack);

// Calls `f(tensor)` for each tensor in a value, be it in a list; f's result replaces the tensor.
template <typename F>
c10::IValue map_tensors(const c10::IValue& value, F f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const auto& t : value.toTensorVector()) mapped.push_back(f(t));
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const auto& t : value.toOptionalTensorVector())
      mapped.push_back(t ? std::optional<at::Tensor>(f(*t)) : std::nullopt);
    return mapped;
  }
  return value;
}

template <typename F>
void for_each_tensor(const c10::IValue& value, F f) {
  map_tensors(value, [&](const at::Tensor& t) {
    f(t);
    return t;
  });
}

}  // namespace vgpu
