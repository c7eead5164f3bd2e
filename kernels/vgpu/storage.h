// Tensors over device memory: making them, resizing them, and seeing them as CPU tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "trace.h"

namespace vgpu {

// The fallback, `opinfo`, `shapes` and `draws` work for any device whose memory is the host's:
// kernels/fakecuda compiles them for CUDA.
#ifdef VGPU_DEVICE_TYPE
constexpr c10::DeviceType kDeviceType = VGPU_DEVICE_TYPE;
#else
constexpr c10::DeviceType kDeviceType = c10::kPrivateUse1;
#endif

inline bool is_vgpu(const at::Tensor& t) {
  return t.defined() && t.device().type() == kDeviceType;
}

// An uninitialised tensor on the current device.
at::Tensor make_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

// A CPU tensor over the same memory, sizes and strides. It owns nothing: stream order keeps the
// memory in place until the kernels enqueued before its free have run.
at::Tensor host_alias(const at::Tensor& t);

// Appends the bytes a tensor spans: one range, or one for each row of a strided matrix.
void add_access(Accesses& accesses, const at::Tensor& t, bool is_write);

void resize_storage(c10::StorageImpl& storage, size_t nbytes);
const at::Tensor& resize_tensor(const at::Tensor& self, at::IntArrayRef sizes,
                         std::optional<at::MemoryFormat> format);

// Enqueues a kernel on the current stream of `device`.
void submit(int device, const std::string& what, const Accesses& accesses,
            std::function<void()> kernel);

// Waits for what is enqueued on the current stream of `device`.
void wait_for_current_stream(int device);

}  // namespace vgpu
