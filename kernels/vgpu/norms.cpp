// GroupNorm's backward by CPU's formula. PyTorch's own asks for the device and keeps the memory
// format of the input only on the CPU; in another format the kernel adds up in another order.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace vgpu {

namespace {

using OptTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GroupNorm : torch::autograd::Function<GroupNorm> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& input,
                               const OptTensor& weight, const OptTensor& bias, int64_t n,
                               int64_t c, int64_t hxw, int64_t groups, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, mean, rstd] = at::native_group_norm(input, weight, bias, n, c, hxw, groups, eps);
    ctx->save_for_backward({input, weight.value_or(at::Tensor()), mean, rstd});
    ctx->saved_data["sizes"] = std::vector<int64_t>{n, c, hxw, groups};
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    ctx->set_materialize_grads(false);
    return {y, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list given) {
    auto saved = ctx->get_saved_variables();
    const auto &input = saved[0], &weight = saved[1], &mean = saved[2], &rstd = saved[3];
    auto sizes = ctx->saved_data["sizes"].toIntVector();
    std::array<bool, 3> wanted{true, weight.defined(), ctx->saved_data["has_bias"].toBool()};
    size_t edge = 0;  // an absent tensor has no edge of its own
    for (bool& want : wanted) want = want && ctx->needs_input_grad(edge++);
    if (at::GradMode::is_enabled() || given[1].defined() || given[2].defined())
      return differentiable(saved, sizes, ctx->saved_data["eps"].toDouble(), given, wanted);
    if (!given[0].defined()) return variable_list(8);
    auto format = input.suggest_memory_format();
    auto [input_grad, weight_grad, bias_grad] = at::native_group_norm_backward(
        given[0].contiguous(format), input.contiguous(format), mean, rstd, weight, sizes[0],
        sizes[1], sizes[2], sizes[3], wanted);
    return {input_grad, weight_grad, bias_grad, {}, {}, {}, {}, {}};
  }

  // The gradients as functions that can be differentiated again.
  static variable_list differentiable(const variable_list& saved, const std::vector<int64_t>& sizes,
                                      double eps, const variable_list& given,
                                      const std::array<bool, 3>& wanted) {
    at::AutoGradMode enabled(true);
    const auto &input = saved[0], &weight = saved[1];
    auto grouped = input.reshape({sizes[0], sizes[3], sizes[1] / sizes[3] * sizes[2]});
    auto mean = grouped.mean(-1);
    auto rstd = (grouped.var(-1, /*unbiased=*/false) + eps).rsqrt();
    auto y = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(input.sizes());
    std::vector<int64_t> by_channel(input.dim(), 1);
    by_channel[1] = sizes[1];
    auto bias = at::zeros({sizes[1]}, input.options()).requires_grad_();
    if (weight.defined()) y = y * weight.view(by_channel);
    y = y + bias.view(by_channel);
    variable_list made{y, mean, rstd}, roots, seeds, leaves, grads(8);
    for (size_t i = 0; i < 3; ++i)
      if (given[i].defined()) roots.push_back(made[i]), seeds.push_back(given[i]);
    const at::Tensor of[] = {input, weight, bias};
    for (size_t i = 0; i < 3; ++i)
      if (wanted[i]) leaves.push_back(of[i]);
    auto found = torch::autograd::grad(roots, leaves, seeds, true, true, true);
    for (size_t i = 0, next = 0; i < 3; ++i)
      if (wanted[i]) grads[i] = found[next++];
    return grads;
  }
};

Results group_norm(const at::Tensor& input, const OptTensor& weight, const OptTensor& bias,
                   int64_t n, int64_t c, int64_t hxw, int64_t groups, double eps) {
  auto out = GroupNorm::apply(input, weight, bias, n, c, hxw, groups, eps);
  return {out[0], out[1], out[2]};
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("native_group_norm", group_norm); }

}  // namespace
}  // namespace vgpu
