"""Hooks of modules inside of the wrapped one, and values that nothing depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import VirtualGPUs
from tests.training.models import SkipMLP, square_loss, vector_batch
from tests.training.test_dropin_graph import same_gradients, wrapped

Register = Callable[[nn.Module], object]
HOOKS: dict[str, Register] = {
    "forward": lambda m: m.register_forward_hook(lambda _, inputs, output: output * 2),
    "before the forward": lambda m: m.register_forward_pre_hook(lambda _, i: (i[0] * 2,)),
    "backward": lambda m: m.register_full_backward_hook(
        lambda _, given, came: tuple(g * 2 for g in given)
    ),
    "before the backward": lambda m: m.register_full_backward_pre_hook(
        lambda _, came: tuple(g * 2 for g in came)
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["at first", "after the first call"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_a_layer(vgpus: VirtualGPUs, kind: str, late: bool) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    handles: list[Any] = []
    for module in (net, model):
        if late:
            square_loss(module(x), y).backward()
            module.zero_grad()
        handles.append(HOOKS[kind](module.layers[2]))
        square_loss(module(x), y).backward()
    same_gradients(model, net)
    for module, handle in zip((net, model), handles, strict=True):
        handle.remove()
        square_loss(module(x), y).backward()
    same_gradients(model, net)


@pytest.mark.parametrize("kind", ["forward", "before the forward"])
def test_forward_hooks_of_the_whole(vgpus: VirtualGPUs, kind: str) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    for module, inner in ((net, net), (model, model.module)):
        HOOKS[kind](inner)
        square_loss(module(x), y).backward()
    same_gradients(model, net)


@pytest.mark.parametrize("kind", ["backward", "before the backward"])
@pytest.mark.filterwarnings("ignore:.*so no recorded forward stands")
def test_a_model_with_backward_hooks_of_what_is_parted_runs_as_it_is(
    vgpus: VirtualGPUs, kind: str
) -> None:
    torch.manual_seed(0)
    net = SkipMLP()
    model = wrapped(net)
    x, y = vector_batch(0)
    x.requires_grad_()
    square_loss(model(x), y).backward()
    model.zero_grad()
    for module, inner in ((net, net), (model, model.module)):
        handle: Any = HOOKS[kind](inner)
        square_loss(module(x), y).backward()
        handle.remove()
    same_gradients(model, net)
    assert model.capture_mode == "eager"


class Ignores(nn.Module):
    """One layer that no gradient flows back through."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.detach() @ self.weight)


class Stops(nn.Module):
    def __init__(self, also: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))
        self.ignores, self.also = Ignores(), also

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.tanh(self.layers[0](x))
        y = torch.tanh(self.layers[1](early))
        y = self.layers[2](self.ignores(y))
        return self.layers[3](y * early if self.also else y)


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("size", [8, 4])
def test_what_no_gradient_reaches_has_none_not_zeros(
    vgpus: VirtualGPUs, size: int, mode: str, also: bool
) -> None:
    """AdamW decays a weight whose gradient is zeros, and leaves alone one that has none."""
    torch.manual_seed(0)
    net = Stops(also)
    model = wrapped(net, microbatch_size=size, device_memory="20KiB", mode=mode)
    for step in range(2):
        for module in (net, model):
            x, y = vector_batch(step)
            x.requires_grad_()
            square_loss(module(x), y).backward()
            assert (x.grad is None) is not also
    assert len(model.plan.spec.backward_packs) >= 2
    for (name, param), other in zip(model.named_parameters(), net.parameters(), strict=True):
        assert (param.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(param.grad, other.grad, rtol=2e-6, atol=1e-8)


def test_an_input_that_is_only_looked_at_has_no_gradient(vgpus: VirtualGPUs) -> None:
    model = wrapped(Ignores())
    x, y = vector_batch(0)
    x.requires_grad_()
    square_loss(model(x), y).backward()
    assert x.grad is None and model.module.weight.grad is not None
