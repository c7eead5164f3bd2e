// Dropout with CPU's bits.
#include <ATen/ATen.h>

namespace vgpu {

namespace {

// PyTorch's formula for CPU. For a device's tensor it would take native_dropout, which scales
// differently in the last bit.
at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (p == 0 || !train || input.numel() == 0) return input;
  if (p == 1) return input.mul(at::zeros({}, input.options()));
  auto noise = at::empty_like(input).bernoulli_(1 - p);
  noise.div_(1 - p);
  return input * noise;
}

}  // namespace
}  // namespace vgpu
