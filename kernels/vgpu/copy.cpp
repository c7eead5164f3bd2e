// copy_ between host and devices, with the synchronisation CUDA gives it.
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "link.h"
#include "pinned.h"
#include "storage.h"
#include "stream.h"

namespace vgpu {

namespace {

Accesses copy_accesses(const at::Tensor& dst, const at::Tensor& src) {
  Accesses accesses;
  // Pageable host memory is left out: such copies are synchronous, and the allocator of the host
  // reuses its addresses in an order that the trace cannot see.
  if (is_vgpu(src) || is_pinned(src.const_data_ptr())) add_access(accesses, src, false);
  if (is_vgpu(dst) || is_pinned(dst.const_data_ptr())) add_access(accesses, dst, true);
  return accesses;
}

void copy_within_device(const at::Tensor& dst, const at::Tensor& src, int device) {
  auto to = host_alias(dst), from = host_alias(src);
  submit(device, "copy", copy_accesses(dst, src), [to, from] { to.copy_(from); });
}

// Runs on the source's current stream; the destination's stream is fenced before (it may still
// use the memory) and after (it may use the copy at once).
void copy_to_peer(const at::Tensor& dst, const at::Tensor& src, int to_device, int from_device) {
  auto& to_stream = current_stream(to_device);
  auto& from_stream = current_stream(from_device);
  from_stream.wait(to_stream.record());
  std::vector<Hop> hops{{from_device, Direction::PeerOut}, {to_device, Direction::PeerIn}};
  auto to = host_alias(dst), from = host_alias(src);
  from_stream.enqueue([to, from, hops] { copy_over_links(to, from, hops); }, "copy p2p",
                      copy_accesses(dst, src));
  to_stream.wait(from_stream.record());
}

void copy_with_host(const at::Tensor& dst, const at::Tensor& src, bool non_blocking) {
  bool to_device = is_vgpu(dst);
  const at::Tensor& host = to_device ? src : dst;
  int device = (to_device ? dst : src).device().index();
  std::vector<Hop> hops{
      {device, to_device ? Direction::HostToDevice : Direction::DeviceToHost}};
  auto& stream = current_stream(device);
  auto to = host_alias(dst), from = host_alias(src);
  stream.enqueue([to, from, hops] { copy_over_links(to, from, hops); },
                 to_device ? "copy h2d" : "copy d2h", copy_accesses(dst, src));
  // As on CUDA: a copy that has to go through a staging buffer is not asynchronous.
  bool is_direct = dst.scalar_type() == src.scalar_type() && dst.strides().equals(src.strides());
  if (non_blocking && is_direct && record_pinned_use(host.const_data_ptr(), stream)) return;
  stream.synchronize();
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  if (dst.numel() == 0) return dst;
  at::Tensor src = self.sizes().equals(dst.sizes()) ? self : self.expand(dst.sizes());
  if (!is_vgpu(src) || !is_vgpu(dst)) {
    copy_with_host(dst, src, non_blocking);
  } else if (src.device() == dst.device()) {
    copy_within_device(dst, src, dst.device().index());
  } else {
    copy_to_peer(dst, src, dst.device().index(), src.device().index());
  }
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (is_vgpu(dst))
    resize_tensor(dst, self.sizes(), std::nullopt);
  else
    dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  int device = self.device().index();
  Accesses accesses;
  add_access(accesses, self, false);
  auto value = std::make_shared<at::Scalar>();
  auto alias = host_alias(self);
  submit(device, "item", accesses, [value, alias] { *value = alias.item(); });
  current_stream(device).synchronize();
  return *value;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
}

// Lazily conjugated or negated tensors: the CPU kernel handles them. PyTorch's own treatment
// would first make a copy of the tensor, by calling _copy_from, and so on for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace vgpu
