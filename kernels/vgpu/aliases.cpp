// Device tensors seen from the host, whose memory they are in: as CPU tensors, and as bytes.
#include <ATen/core/Tensor.h>

#include "storage.h"

namespace vgpu {

at::Tensor host_alias(const at::Tensor& t) {
  // Not at::from_blob(): this is on the path of every operand and from_blob() costs ten times as
  // much. The whole storage is mirrored, so that kernels may restride within it.
  const auto& storage = t.storage();
  auto impl = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(const_cast<void*>(storage.data()), c10::Device(c10::kCPU)), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(impl)), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* raw = alias.unsafeGetTensorImpl();
  raw->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) raw->set_wrapped_number(true);
  if (t.is_conj()) alias._set_conj(true);
  if (t.is_neg()) alias._set_neg(true);
  return alias;
}

void add_access(Accesses& accesses, const at::Tensor& t, bool is_write) {
  if (!trace::enabled() || t.numel() == 0) return;
  constexpr int64_t kMaxRows = 64;
  uint64_t base = reinterpret_cast<uint64_t>(t.const_data_ptr());
  uint64_t item = t.element_size();
  auto span = [&](int64_t first_dim) {
    uint64_t last = 0;
    for (int64_t d = first_dim; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return (last + 1) * item;
  };
  bool has_gaps = t.dim() > 1 && span(0) > static_cast<uint64_t>(t.numel()) * item;
  if (has_gaps && t.size(0) <= kMaxRows && span(1) <= t.stride(0) * item) {
    for (int64_t row = 0; row < t.size(0); ++row)
      accesses.push_back({base + row * t.stride(0) * item, span(1), is_write});
    return;
  }
  accesses.push_back({base, span(0), is_write});
}

}  // namespace vgpu
