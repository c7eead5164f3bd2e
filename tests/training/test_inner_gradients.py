"""Forwards that compute gradients: energies and forces, penalties, `torch.func`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from harmony.capture.graph.saved_hooks import hooks_aside
from tests import devices

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no recorded forward stands for the next"),
    pytest.mark.filterwarnings("ignore:.*is one layer"),
]

Inner = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def of_an_energy(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    (force,) = torch.autograd.grad(layer(x).tanh().pow(3).sum(), x, create_graph=True)
    return force


def apart_from_the_graph(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    own = x.detach().requires_grad_()
    return torch.autograd.grad(layer(own).tanh().sum(), own)[0]


def by_vjp(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out, pull = torch.func.vjp(lambda h: layer(h).tanh(), x)
    return pull(out)[0]


def by_jacobians(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Adds up three gradients of each sample, in an order that the last bits depend on."""
    both = lambda h: torch.stack([(h**2).sum(), (h**3).sum()])  # noqa: E731
    return torch.vmap(torch.func.jacrev(both))(layer(x).tanh()).sum(1)


class Block(nn.Module):
    def __init__(self, inner: Inner, keeps: bool = False) -> None:
        super().__init__()
        self.lin, self.inner = nn.Linear(16, 16), inner
        self.seen: list[float] | None = [] if keeps else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            self.seen.append(float(x.detach().sum()))
        return self.lin(x) + self.inner(self.lin, x)


def _net(inner: Inner, keeps: bool = False) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(16, 16), Block(inner, keeps)) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


def _batches() -> list[Any]:
    return [((torch.randn(6, 16),), torch.randint(4, (6,))) for _ in range(2)]


@pytest.mark.parametrize(
    "inner", [of_an_energy, apart_from_the_graph, by_vjp, by_jacobians], ids=lambda f: f.__name__
)
def test_a_layer_that_differentiates_runs_in_any_pack(vgpus: VirtualGPUs, inner: Inner) -> None:
    torch.manual_seed(0)
    net = _net(inner)
    plain = copy.deepcopy(net)
    model = assert_same_training(net, _batches(), device_memory="14KiB")
    assert model.plan.spec.forward_packs and not model.plan.spec.saved
    mine = copy.deepcopy(plain)
    model = harmony.Harmony(mine, devices=2, device_memory="14KiB", microbatch_size=6, mode="pp")
    for (x,), targets in _batches():
        expected, found = (F.cross_entropy(module(x), targets) for module in (plain, model))
        assert torch.equal(found, expected)
        expected.backward()
        found.backward()
    for one, two in zip(mine.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", [of_an_energy, by_jacobians], ids=lambda f: f.__name__)
def test_a_model_that_runs_as_it_is_may_differentiate(vgpus: VirtualGPUs, inner: Inner) -> None:
    torch.manual_seed(0)
    net = _net(inner, keeps=True)
    model = assert_same_training(net, _batches())
    assert model.plan is None


class Reversed(torch.autograd.Function):
    """Runs a module again in its backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module, *params: Any) -> torch.Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            again = ctx.module(x)
        params = list(ctx.module.parameters())
        found = torch.autograd.grad(again, [x, *params], gradients)
        return found[0], None, *found[1:]


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Reversed.apply(self.first(x), self.inner, *self.inner.parameters())
        return self.head(x)


def test_a_backward_may_call_modules(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Reversible()
    plain = copy.deepcopy(net)
    assert assert_same_training(net, _batches()).plan is None
    mine = copy.deepcopy(plain)
    model = harmony.Harmony(mine, devices=1)
    ((x,), targets), _ = _batches()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was called by itself")
        for module in (plain, model):
            F.cross_entropy(module(x), targets).backward()
    for one, two in zip(mine.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]


@pytest.mark.skipif(devices.REAL, reason="on a GPU autograd adds the uses up in another order")
def test_a_model_that_runs_as_it_is_differentiates_by_its_parameters(vgpus: VirtualGPUs) -> None:
    def stepped(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(layer(x).square().mean(), layer.weight, create_graph=True)
        return F.linear(x, layer.weight - 0.1 * found)

    torch.manual_seed(0)
    assert assert_same_training(_net(stepped, keeps=True), _batches()).plan is None


def test_hooks_that_were_put_aside_are_there_again() -> None:
    seen: list[str] = []

    def noting(name: str) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (seen.append(name), tensor)[1], lambda tensor: tensor
        )

    x = torch.randn(3, requires_grad=True)
    with noting("outer"), noting("inner"):
        with hooks_aside():
            torch.func.grad(lambda h: h.exp().sum())(x.detach())
            x.exp()
        assert not seen
        x.exp()
    assert seen == ["inner"]
    with pytest.raises(RuntimeError, match="saved tensor hooks"), noting("outer"):
        torch.func.grad(lambda h: h.exp().sum())(x.detach())
