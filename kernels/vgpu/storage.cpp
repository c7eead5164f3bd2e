#include "storage.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/Resize.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <cstring>

#include "memory.h"
#include "stream.h"

namespace vgpu {

at::Tensor make_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype);
}

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

void submit(int device, const std::string& what, const Accesses& accesses,
            std::function<void()> kernel) {
  auto task = [kernel = std::move(kernel), has_grad = at::GradMode::is_enabled()] {
    auto begin = Clock::now();
    {
      at::AutoGradMode mode(has_grad);  // oneDNN chooses by it
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      kernel();
    }
    double slowdown = config().slowdown;
    double delay_us = config().delay_us;
    if (slowdown > 1) {
      std::chrono::duration<double, std::micro> took = Clock::now() - begin;
      delay_us += (slowdown - 1) * took.count();
    }
    sleep_us(delay_us);
    worker_busy_since() = Clock::now();
  };
  current_stream(device).enqueue(std::move(task), what, accesses);
}

void wait_for_current_stream(int device) { current_stream(device).synchronize(); }

void resize_storage(c10::StorageImpl& storage, size_t nbytes) {
  int device = storage.device().index();
  c10::DeviceGuard guard(storage.device());
  auto fresh = device_allocator().allocate(nbytes);
  size_t kept_nbytes = std::min(nbytes, storage.nbytes());
  if (kept_nbytes) {
    void* dst = fresh.get();
    const void* src = storage.data();
    submit(device, "resize storage",
           {{reinterpret_cast<uint64_t>(src), kept_nbytes, false},
            {reinterpret_cast<uint64_t>(dst), kept_nbytes, true}},
           [=] { memcpy(dst, src, kept_nbytes); });
  }
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(nbytes);
}

const at::Tensor& resize_tensor(const at::Tensor& self, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> format) {
  if (self.sizes().equals(sizes) && !format) return self;
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  if (format) impl->empty_tensor_restride(*format);
  size_t nbytes = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (impl->numel() > 0 && nbytes > storage->nbytes()) resize_storage(*storage, nbytes);
  return self;
}

}  // namespace vgpu
