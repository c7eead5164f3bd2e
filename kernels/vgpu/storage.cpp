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
