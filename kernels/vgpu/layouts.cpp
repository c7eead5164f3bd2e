#include "layouts.h"

#include <ATen/ATen.h>
#include <ATen/NestedTensorImpl.h>
#include <ATen/SparseCsrTensorImpl.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/SparseTensorUtils.h>
#include <ATen/ops/_coalesced_native.h>
#include <ATen/ops/_indices_native.h>
#include <ATen/ops/_nested_tensor_size_native.h>
#include <ATen/ops/_nested_tensor_storage_offsets_native.h>
#include <ATen/ops/_nested_tensor_strides_native.h>
#include <ATen/ops/_nnz_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_and_tensors_native.h>
#include <ATen/ops/_sparse_coo_tensor_with_dims_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/_values_native.h>
#include <ATen/ops/ccol_indices_native.h>
#include <ATen/ops/clone_native.h>
#include <ATen/ops/col_indices_native.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/crow_indices_native.h>
#include <ATen/ops/dense_dim_native.h>
#include <ATen/ops/empty_like_native.h>
#include <ATen/ops/empty_native.h>
#include <ATen/ops/indices_native.h>
#include <ATen/ops/is_coalesced_native.h>
#include <ATen/ops/is_same_size_native.h>
#include <ATen/ops/row_indices_native.h>
#include <ATen/ops/sparse_dim_native.h>
#include <ATen/ops/values_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>

#include "fallback.h"
#include "storage.h"
#include "stream.h"

namespace vgpu {

namespace {

// What a compressed tensor consists of: row or column pointers, the other index, values.
std::array<at::Tensor, 3> compressed_parts(const at::Tensor& t) {
  auto* impl = at::sparse_csr::get_sparse_csr_impl(t);
  return {impl->compressed_indices(), impl->plain_indices(), impl->values()};
}

at::Tensor make_coo(const at::Tensor& like, const at::Tensor& indices, const at::Tensor& values) {
  return at::_sparse_coo_tensor_with_dims_and_tensors(
      like.sparse_dim(), like.dense_dim(), like.sizes(), indices, values,
      values.options().layout(at::kSparse), like.is_coalesced());
}

at::Tensor make_compressed(const at::Tensor& like, const std::array<at::Tensor, 3>& parts) {
  return at::_sparse_compressed_tensor_unsafe(parts[0], parts[1], parts[2], like.sizes(),
                                              parts[2].options().layout(like.layout()));
}

at::Tensor make_nested(const at::Tensor& like, const at::Tensor& buffer) {
  auto* impl = at::native::get_nested_tensor_impl(like);
  return at::detail::make_tensor<at::native::NestedTensorImpl>(
      buffer, impl->get_nested_sizes(), impl->get_nested_strides(),
      impl->get_storage_offsets());
}

// Builds a tensor of the layout of `t` from its dense parts, each sent through `f`.
template <typename F>
at::Tensor map_parts(const at::Tensor& t, F f) {
  if (t.is_nested()) return make_nested(t, f(at::native::get_nested_tensor_impl(t)->get_buffer()));
  if (t.layout() == at::kSparse) {
    auto* impl = at::sparse::get_sparse_impl(t);
    return make_coo(t, f(impl->indices()), f(impl->values()));
  }
  TORCH_CHECK_NOT_IMPLEMENTED(at::sparse_csr::is_sparse_compressed(t), "vgpu: tensors of layout ",
                              t.layout(), " are not supported; use dense or sparse ones");
  auto parts = compressed_parts(t);
  return make_compressed(t, {f(parts[0]), f(parts[1]), f(parts[2])});
}

at::Tensor upload_dense(const at::Tensor& t, int device, const std::string& what) {
  at::Tensor result = make_tensor(t.sizes(), t.strides(), t.scalar_type());
  if (t.is_conj()) result._set_conj(true);
  if (t.is_neg()) result._set_neg(true);
  if (t.numel() == 0) return result;
  Accesses accesses;
  add_access(accesses, result, true);
  submit(device, what, accesses, [alias = host_alias(result), t] { alias.copy_(t); });
  return result;
}

// After an operator worked on a CPU tensor in the place of a sparse one: takes over what it made.
void write_back(const at::Tensor& to, const at::Tensor& from, int device,
                const std::string& what) {
  auto fresh = upload(from, device, what);
  if (to.layout() == at::kSparse) {
    auto* impl = at::sparse::get_sparse_impl(to);
    impl->raw_resize_(from.sparse_dim(), from.dense_dim(), from.sizes());
    impl->set_indices_and_values_unsafe(fresh._indices(), fresh._values());
    impl->set_coalesced(from.is_coalesced());
  } else if (to.is_nested()) {
    at::native::get_nested_tensor_impl(to)->get_buffer().copy_(
        at::native::get_nested_tensor_impl(fresh)->get_buffer());
  } else {
    auto parts = compressed_parts(fresh);
    at::sparse_csr::get_sparse_csr_impl(to)->set_member_tensors(parts[0], parts[1], parts[2],
                                                                from.sizes());
  }
}

// The dense memory of the first argument that is not dense: what a view of it is a view of.
at::Tensor memory_of(const Stack& arguments) {
  at::Tensor memory;
  for (const auto& value : arguments)
    for_each_tensor(value, [&](const at::Tensor& t) {
      if (memory.defined() || !is_vgpu(t) || is_dense(t)) return;
      memory = t.is_nested() ? at::native::get_nested_tensor_impl(t)->get_buffer() : t._values();
    });
  return memory;
}

// Views of nested tensors: geometry from the CPU kernel, memory of the device.
void run_nested_view(const c10::OperatorHandle& op, const OpInfo& info, const Stack& arguments,
                     Stack* stack) {
  at::Tensor memory = memory_of(arguments);
  Accesses none;
  Stack results = to_cpu(info, arguments, none);
  op.callBoxed(&results);
  for (const auto& result : results)
    stack->push_back(map_tensors(result, [&](const at::Tensor& t) {
      return t.is_nested() ? make_nested(t, memory)
                           : at::as_strided(memory, t.sizes(), t.strides(), t.storage_offset());
    }));
}

// Some CPU kernels keep what the backward needs only if there will be one.
void copy_requires_grad(const Stack& from, const Stack& to) {
  for (size_t i = 0; i < from.size(); ++i) {
    if (!from[i].isTensor() || !to[i].isTensor()) continue;
    const auto &t = from[i].toTensor(), &alias = to[i].toTensor();
    if (is_vgpu(t) && t.requires_grad()) alias.set_requires_grad(true);
  }
}

// Operators on sparse and nested tensors. How long their results are depends on the data, so
// each of them waits.
void parts_fallback(const c10::OperatorHandle& op, Stack* stack) {
  const OpInfo& info = op_info(op);
  Stack arguments = torch::jit::pop(*stack, info.is_written.size());
  int device = find_device(info, arguments);
  c10::DeviceGuard guard(c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device)));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (info.is_view) return run_nested_view(op, info, arguments, stack);
  Accesses accesses;
  Stack on_host = to_cpu(info, arguments, accesses);
  copy_requires_grad(arguments, on_host);
  auto results = std::make_shared<Stack>(on_host);
  std::vector<std::pair<at::Tensor, std::shared_ptr<at::Tensor>>> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!info.is_written[i] || !arguments[i].isTensor()) continue;
    const auto& t = arguments[i].toTensor();
    if (!is_vgpu(t) || is_dense(t)) continue;
    auto owner = std::make_shared<at::Tensor>(on_host[i].toTensor());
    written.emplace_back(t, owner);
    // The kernel may give it more elements than there is room for in the memory of the device.
    submit(device, info.name, accesses, [owner, results, i] {
      *owner = owner->clone();
      (*results)[i] = *owner;
    });
  }
  submit(device, info.name, accesses, [op, results] { op.callBoxed(results.get()); });
  current_stream(device).synchronize();
  for (const auto& [t, owner] : written) write_back(t, *owner, device, info.name);
  push_results(info, arguments, std::move(*results), device, stack);
}

// Everything CPU has a kernel for, unless a kernel is there already.
void register_parts(torch::Library& m, c10::DispatchKey cpu, c10::DispatchKey ours) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findSchema(name);
    if (!op || name.name.rfind("aten::", 0) != 0) continue;
    if (!op->hasKernelForDispatchKey(cpu) || op->hasKernelForDispatchKey(ours)) continue;
    std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    m.impl(full.c_str() + strlen("aten::"),
           torch::CppFunction::makeFromBoxedFunction<&parts_fallback>());
  }
}

// PyTorch's own kernels, where they only take tensors apart or put them together.
TORCH_LIBRARY_IMPL(aten, SparsePrivateUse1, m) {
  m.impl("_values", at::native::_values_sparse);
  m.impl("_indices", at::native::_indices_sparse);
  m.impl("values", at::native::values_sparse);
  m.impl("indices", at::native::indices_sparse);
  m.impl("is_coalesced", at::native::is_coalesced_sparse);
  m.impl("_nnz", at::native::_nnz_sparse);
  m.impl("sparse_dim", at::native::sparse_dim_sparse);
  m.impl("dense_dim", at::native::dense_dim_sparse);
  m.impl("_dimI", at::native::sparse_dim_sparse);
  m.impl("_dimV", at::native::dense_dim_sparse);
  m.impl("_coalesced_", at::native::_coalesced_sparse_);
  m.impl("copy_", at::native::copy_sparse_wrapper_);
  m.impl("copy_sparse_to_sparse_", at::native::copy_sparse_);
  m.impl("clone", at::native::clone_sparse);
  m.impl("empty.memory_format", at::native::empty_sparse_symint);
  m.impl("empty_like", at::native::empty_like_sparse_coo);
  m.impl("_sparse_coo_tensor_with_dims", at::native::new_with_dims_sparse);
  m.impl("_sparse_coo_tensor_with_dims_and_tensors",
         at::native::new_with_dims_and_tensor_sparse_symint);
  register_parts(m, c10::DispatchKey::SparseCPU, c10::DispatchKey::SparsePrivateUse1);
}

TORCH_LIBRARY_IMPL(aten, SparseCsrPrivateUse1, m) {
  m.impl("values", at::native::values_sparse_csr);
  m.impl("crow_indices", at::native::crow_indices_sparse_csr);
  m.impl("col_indices", at::native::col_indices_sparse_csr);
  m.impl("ccol_indices", at::native::ccol_indices_sparse_csr);
  m.impl("row_indices", at::native::row_indices_sparse_csr);
  m.impl("_nnz", at::native::_nnz_sparse_csr);
  m.impl("sparse_dim", at::native::sparse_dim_sparse_csr);
  m.impl("dense_dim", at::native::dense_dim_sparse_csr);
  m.impl("copy_", at::native::copy_sparse_compressed_);
  m.impl("clone", at::native::clone_sparse_compressed);
  m.impl("empty.memory_format", at::native::empty_sparse_compressed_symint);
  m.impl("empty_like", at::native::empty_like_sparse_csr);
  register_parts(m, c10::DispatchKey::SparseCsrCPU, c10::DispatchKey::SparseCsrPrivateUse1);
}

TORCH_LIBRARY_IMPL(aten, NestedTensorPrivateUse1, m) {
  m.impl("_nested_tensor_size", at::native::_nested_tensor_size);
  m.impl("_nested_tensor_strides", at::native::_nested_tensor_strides);
  m.impl("_nested_tensor_storage_offsets", at::native::_nested_tensor_storage_offsets);
  m.impl("is_same_size", at::native::nested_is_same_size);
  m.impl("_to_copy", at::native::_to_copy_nested);
  m.impl("copy_", at::native::copy_nested_);
  m.impl("clone", at::native::clone_nested);
  m.impl("empty_like", at::native::empty_like_nested);
  register_parts(m, c10::DispatchKey::NestedTensorCPU, c10::DispatchKey::NestedTensorPrivateUse1);
}

}  // namespace

at::Tensor host_alias_of_parts(const at::Tensor& t, bool is_written, Accesses& accesses) {
  return map_parts(t, [&](const at::Tensor& part) {
    add_access(accesses, part, is_written);
    return host_alias(part);
  });
}

at::Tensor upload(const at::Tensor& t, int device, const std::string& what) {
  if (is_dense(t)) return upload_dense(t, device, what);
  return map_parts(t, [&](const at::Tensor& part) { return upload_dense(part, device, what); });
}

}  // namespace vgpu
