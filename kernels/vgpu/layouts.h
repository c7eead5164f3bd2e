// Sparse and nested tensors on the device: dense tensors behind another face.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "trace.h"

namespace vgpu {

inline bool is_dense(const at::Tensor& t) {
  return t.layout() == at::kStrided && !t.is_nested();
}

// A CPU tensor of the same layout over the same memory as a sparse or nested tensor.
at::Tensor host_alias_of_parts(const at::Tensor& t, bool is_written, Accesses& accesses);

// A device tensor like this one on the host, of any layout. Enqueues the copies.
at::Tensor upload(const at::Tensor& t, int device, const std::string& what);

}  // namespace vgpu
