"""What a recording does not see inside of: one opaque step, or a module that is one layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional as F

import harmony
from harmony.errors import CaptureError

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training


def batches(count: int = 3) -> list[Any]:
    return [((torch.randn(4, 8),), torch.randint(0, 4, (4,))) for _ in range(count)]


def layers_of(model: harmony.Harmony) -> list[str]:
    variant = next(iter(model._engine.variants))
    return [layer.name for layer in variant.graph.layers]


@torch.jit.script
def bias_gelu(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    y = x + b
    return y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))


@torch.jit.script
def split_and_scale(
    x: torch.Tensor, scale: float, flip: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    one, two = x.chunk(2, -1)
    return (two if flip else one) * scale, [one, two]


traced = torch.jit.trace(lambda x: torch.relu(x) * torch.sigmoid(x), torch.randn(4, 16))


def in_place(x: torch.Tensor) -> torch.Tensor:
    x.mul_(2.0)
    return x.add_(1.0)


scripted_in_place = torch.jit.script(in_place)


class Between(nn.Module):
    """Two layers, a parameter, and something between them."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16, bias=False), nn.Linear(16, 4)
        self.bias = nn.Parameter(torch.randn(16))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.between(self, self.a(x)))


def script_of_a_parameter(net: Any, h: torch.Tensor) -> torch.Tensor:
    return bias_gelu(h, net.bias)


def script_of_several(net: Any, h: torch.Tensor) -> torch.Tensor:
    half, parts = split_and_scale(h, 0.5, flip=True)
    return torch.cat([half, parts[0]], -1)


def script_by_tracing(net: Any, h: torch.Tensor) -> torch.Tensor:
    return traced(h + net.bias)


def script_that_writes(net: Any, h: torch.Tensor) -> torch.Tensor:
    return scripted_in_place(h + net.bias) + h


SCRIPTS = [script_of_a_parameter, script_of_several, script_by_tracing, script_that_writes]


@pytest.mark.parametrize("between", SCRIPTS)
def test_a_torchscript_function_in_the_forward_gets_its_gradients(
    between: Any, vgpus: VirtualGPUs
) -> None:
    """The script ``script_function``: TorchScript runs below what a recording sees."""
    torch.manual_seed(0)
    net = Between(between)
    for _ in range(3):  # its first calls run unoptimised, with other last bits
        net(torch.randn(4, 8)).sum().backward()
    net.zero_grad()
    model = assert_same_training(net, batches())
    assert model.capture_mode == "trace"
    assert len(layers_of(model)) > 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.linear(x)))


@pytest.mark.parametrize("how", ["scripted", "traced", "scripted as a whole"])
def test_a_torchscript_module_is_one_layer(how: str, vgpus: VirtualGPUs) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(8, 8), Normed(), nn.Linear(8, 4))
        if how == "scripted as a whole":
            return torch.jit.script(whole)
        by_tracing = functools.partial(torch.jit.trace, example_inputs=torch.randn(4, 8))
        whole[1] = (torch.jit.script if how == "scripted" else by_tracing)(whole[1])
        return whole

    model = assert_same_training(make(), batches(4), plain=make())
    assert len(layers_of(model)) == (1 if "whole" in how else 3)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ctx.scale = 2.0 + 0 * len(list(layer.parameters()))
        return x * ctx.scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, gradient * ctx.scale


def tensor_hook(net: Any, h: torch.Tensor) -> torch.Tensor:
    h.register_hook(lambda gradient: gradient * 2)
    return torch.relu(h)


def kept_gradient(net: Any, h: torch.Tensor) -> torch.Tensor:
    h.retain_grad()
    return torch.relu(h)


def inner_gradient(net: Any, h: torch.Tensor) -> torch.Tensor:
    energy = (h * net.bias).square().sum()
    return h + torch.autograd.grad(energy, h, create_graph=True)[0] * 0.1


def function_of_a_module(net: Any, h: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(net.b, h)


def made_weights(net: Any, h: torch.Tensor) -> torch.Tensor:
    weight = torch.outer(net.bias[:4], net.bias)
    made = torch.func.functional_call(net.b, {"weight": weight}, (h,))
    return torch.cat([made, made, made, made], -1) + h


def per_sample(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h + torch.vmap(lambda row: torch.tanh(net.b(row)).sum() * row)(h)


def inner_function_gradient(net: Any, h: torch.Tensor) -> torch.Tensor:
    return h + torch.func.grad(lambda x: (x.tanh() * net.bias).sum())(h)


def reentrant_checkpoint(net: Any, h: torch.Tensor) -> torch.Tensor:
    part = lambda x: torch.tanh(x) * net.bias  # noqa: E731
    return torch.utils.checkpoint.checkpoint(part, h, use_reentrant=True)


class Bag:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class TakesABag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, bag: Bag) -> torch.Tensor:
        return self.inner(bag.tensor)


CLOSED = [
    tensor_hook,
    inner_gradient,
    function_of_a_module,
    made_weights,
    per_sample,
    inner_function_gradient,
    reentrant_checkpoint,
]


@pytest.mark.parametrize("between", CLOSED)
def test_a_module_that_cannot_be_recorded_is_one_layer(between: Any, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Between(between))
    model = assert_same_training(net, batches())
    assert layers_of(model) == ["0", "1"]


def test_a_gradient_that_is_kept_for_the_user_is_no_layer_of_a_plan(vgpus: VirtualGPUs) -> None:
    """Whoever asks for it looks at it: the module runs as it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), Between(kept_gradient))
    assert assert_same_training(net, batches()).capture_mode == "eager"


class Mapped(nn.Module):
    """What ``torch.vmap`` makes, between two layers, of a mask or a parameter."""

    def __init__(self, between: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.randn(8))
        self.between = between

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.between(self, self.a(x), mask)))


def closes_over_a_parameter(net: Any, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scale = net.scale
    return torch.vmap(lambda row: torch.tanh(row * scale))(h)


def mask_of_indices(net: Any, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The way of transformers: nested functions of indices, one of which reads the padding."""
    functions = (lambda b, q: mask[b, q], lambda b, q: q >= 1)

    def both(b: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return functions[0](b, q) & functions[1](b, q)

    mapped = torch.vmap(torch.vmap(both, in_dims=(None, 0)), in_dims=(0, None))
    with TransformGetItemToIndex():
        allowed = mapped(torch.arange(len(h), device=h.device), torch.arange(8, device=h.device))
    return torch.where(allowed, h, 0.0)


def given_by_partial(net: Any, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    def weighed(row: torch.Tensor, table: dict[str, torch.Tensor]) -> torch.Tensor:
        return row * table["scale"]

    return torch.vmap(functools.partial(weighed, table={"scale": net.scale}))(h)


@pytest.mark.parametrize("between", [closes_over_a_parameter, mask_of_indices, given_by_partial])
def test_a_mapped_function_is_one_step_of_the_glue(between: Any, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    inputs = [
        ((torch.randn(4, 8), torch.rand(4, 8) > 0.3), torch.randint(0, 4, (4,))) for _ in range(3)
    ]
    model = assert_same_training(Mapped(between), inputs)
    assert {"a", "b"} <= set(layers_of(model))


def cut_at_the_longest(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return h[:, : lengths.max()]


def divided_by_what_is_left(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    left = h[:, lengths.min() :]
    return left / left.shape[1]


def made_as_long(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    longest = lengths.max()
    return h[:, :longest] * torch.full((longest, 8), 0.5, device=h.device)


def picked_by_a_range(h: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return h[:, torch.arange(lengths.max(), device=h.device)]


class Cut(nn.Module):
    def __init__(self, cut: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.cut = nn.Linear(8, 8), nn.Linear(8, 4), cut

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.b(self.cut(torch.relu(self.a(x)), lengths)).mean(1)


@pytest.mark.parametrize(
    "cut", [cut_at_the_longest, divided_by_what_is_left, made_as_long, picked_by_a_range]
)
def test_a_bound_that_is_a_tensor_is_read_anew(cut: Any, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    inputs = [
        ((torch.randn(4, 6, 8), torch.randint(1, 6, (4,))), torch.randint(0, 4, (4,)))
        for _ in range(4)
    ]
    assert_same_training(Cut(cut), inputs)


@pytest.mark.filterwarnings("ignore")
def test_attention_masks_that_transformers_maps_are_steps(vgpus: VirtualGPUs) -> None:
    """PaliGemma makes its mask by ``torch.vmap``, of which tokens are an image's."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 32}
    config = transformers.PaliGemmaConfig(
        text_config={**text, "pad_token_id": 0, "model_type": "gemma", "use_cache": False},
        vision_config=vision,
        projection_dim=32,
        image_token_index=60,
        hidden_size=32,
    )
    net = transformers.PaliGemmaForConditionalGeneration(config).train()
    plain = transformers.PaliGemmaForConditionalGeneration(config).train()
    plain.load_state_dict(net.state_dict())
    ids = torch.cat([torch.full((2, 16), 60), torch.randint(1, 59, (2, 8))], 1)
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 16, 16),
        "token_type_ids": torch.cat([torch.zeros(2, 20), torch.ones(2, 4)], 1).long(),
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clamp(max=59),
    }
    wanted = plain(**batch).loss
    wanted.backward()
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1},
        devices=2,
        microbatch_size=2,
        mode="pp",
        updates="host",
    )
    assert torch.equal(model.train_step(batch), wanted.detach())
    assert model.capture_mode == "trace"
    assert len(layers_of(model)) > 5
    own = dict(net.named_parameters())
    for name, param in plain.named_parameters():
        assert param.grad is None or torch.equal(own[name].grad, param.grad), name


def test_tensors_hidden_in_an_object_go_through_one_layer(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Between(lambda net, h: net.bag(Bag(h)))
    net.bag = TakesABag()
    assert_same_training(net, batches())


def test_what_becomes_one_layer_is_said_with_the_line() -> None:
    net = nn.Sequential(nn.Linear(8, 8), Between(tensor_hook))
    with pytest.warns(UserWarning, match=r"1 \(Between\) is one layer.*test_closed_modules"):
        harmony.capture.capture(net, (torch.randn(4, 8),))


def test_a_loss_that_cannot_be_recorded_is_refused_by_name() -> None:
    def loss(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: F.cross_entropy(x, targets))(out).square().mean()

    with pytest.raises(CaptureError, match=r"torch\.func transform .*test_closed_modules"):
        harmony.capture.capture(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)),
            (torch.randn(4, 8),),
            loss=loss,
            targets=torch.randint(0, 4, (4,)),
        )


def test_a_backward_inside_of_a_layer_is_refused_by_name() -> None:
    def between(net: Any, h: torch.Tensor) -> torch.Tensor:
        (h * net.bias).sum().backward(retain_graph=True)
        return h

    layer = Between(between)
    with pytest.raises(CaptureError, match=r"backward .*test_closed_modules"):
        harmony.capture.capture(nn.Sequential(nn.Linear(8, 8), layer), (torch.randn(4, 8),))


def test_a_tensor_that_learns_but_is_no_parameter_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].scale = torch.ones(8, requires_grad=True)
    with pytest.raises(CaptureError, match=r"0\.scale .*make it an nn\.Parameter"):
        harmony.capture.capture(net, (torch.randn(4, 8),))


class Handed(nn.Module):
    """A block that is given the module to end with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return x + norm(torch.relu(self.linear(x)))


class HandsOver(nn.Module):
    """Blocks that get modules of the model as arguments: each its own, or all the same."""

    def __init__(self, num_norms: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Handed() for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(num_norms)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, self.norms[index % len(self.norms)])
        return self.head(x)


@pytest.mark.parametrize("num_norms", [1, 3])
def test_a_module_that_a_layer_gets_as_an_argument_is_the_one_on_the_device(
    num_norms: int, vgpus: VirtualGPUs
) -> None:
    """One device: a weight of several packs is summed pack by pack, which is another order."""
    torch.manual_seed(0)
    model = assert_same_training(HandsOver(num_norms), batches(), devices=1)
    assert len(layers_of(model)) == 4


class Halved(nn.Linear):
    """Adds something to its call, not to its forward."""

    def __call__(self, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = super().__call__(inputs * 0.5, **kwargs)
        return found * 0.5


class Remembered(nn.Sequential):
    """Makes its call with more than it is given; a block with layers inside."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().__call__(inputs.clone())
        return found + inputs


@pytest.mark.parametrize("kind", ["leaf", "blocks", "root"])
def test_a_call_of_a_class_of_its_own_is_made_once(kind: str, vgpus: VirtualGPUs) -> None:
    """What ``__call__`` added around a layer's forward was computed twice, with no word said."""
    torch.manual_seed(0)
    net: nn.Module
    if kind == "leaf":
        net = nn.Sequential(Halved(8, 16), nn.ReLU(), Halved(16, 4))
    elif kind == "blocks":
        blocks = [Remembered(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
        net = nn.Sequential(*blocks, nn.Linear(8, 4))
    else:
        net = Halved(8, 4)
    assert_same_training(net, batches())
