"""Forwards that set attributes of modules: read by the caller, the loss, a layer, or the next."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .conftest import VirtualGPUs
from .effects import Batches, model_of, train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LENGTHS = (3, 5, 5, 2)


class Scaled(nn.Module):
    """A layer of its own Python, which reads what others set on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) * 0.3)
        self.scale: float = 1.0
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is not None:
            x = x + self.table.to(x.device)
        return torch.tanh(x @ self.weight) * self.scale


class Setting(nn.Module):
    """Sets attributes, on itself or on its layers, in the way that its name says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), Scaled(), nn.Linear(8, 8)
        self.how, self.length, self.longest, self.ready = how, 0, 0, False
        self.lengths: list[int] = []
        self.used: torch.Tensor | None = None
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._set(x)
        h = self.first(x)
        if self.how == "first batch" and not self.ready:
            self.scale.copy_(1 / h.detach().flatten(0, 1).std(0))
            self.ready = True
        if self.how == "twice":
            self.layer.scale = 2.0
            h = self.layer(h)
            self.layer.scale = 3.0
        h = self.layer(h * self.scale)
        if self.how == "counted tokens":
            chosen = torch.nonzero(h.detach()[..., 0] > 0)
            self.used = torch.full((1,), float(len(chosen)))
        if self.how == "after":
            h, self.ready = h * (2 if self.ready else 1), x.shape[1] > 3
        return self.last(h)  # type: ignore[no-any-return]

    def _set(self, x: torch.Tensor) -> None:
        if self.how == "length":
            self.length, self.lengths = x.shape[1], [x.shape[1]]
        elif self.how == "longest":
            self.longest = max(self.longest, x.shape[1])
        elif self.how == "on a layer":
            self.layer.scale = 1 / x.shape[1]
        elif self.how == "by values":
            self.layer.scale = float(x.mean())
        elif self.how == "table":
            self.layer.table = torch.arange(x.shape[1]).float()[:, None]


def batches() -> Batches:
    return [(torch.randn(4, length, 8), torch.randn(4, length, 8)) for length in LENGTHS]


def seen(net: Setting) -> tuple[Any, ...]:
    used = None if net.used is None else net.used.tolist()
    return (net.length, net.lengths, net.longest, net.ready, net.layer.scale, used)


def compare(net: Setting, loss_of: Callable[[Setting], Any], way: str) -> None:
    """Train step by step in both ways; compare losses, state, and what the caller sees."""
    torch.manual_seed(0)
    twin, data = copy.deepcopy(net), batches()
    model = model_of(net, way, loss_of(net), microbatch_size=4)
    for batch in data:
        expected = train(twin, twin, [batch], loss_of(twin), "plain")
        found = train(model, net, [batch], loss_of(net), way)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert seen(net) == seen(twin)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("how", ["length", "longest", "first batch", "after", "counted tokens"])
def test_the_caller_sees_what_the_forward_has_set(vgpus: VirtualGPUs, how: str, way: str) -> None:
    vgpus(count=2)
    compare(Setting(how), lambda net: F.mse_loss, way)


@pytest.mark.parametrize("how", ["on a layer", "twice", "by values", "table"])
def test_a_layer_reads_what_the_forward_around_it_sets(vgpus: VirtualGPUs, how: str) -> None:
    vgpus(count=2)
    compare(Setting(how), lambda net: F.mse_loss, "step")


def test_a_loss_reads_what_the_forward_has_set(vgpus: VirtualGPUs) -> None:
    vgpus(count=2)

    def loss_of(net: Setting) -> Any:
        return lambda out, target: F.mse_loss(out, target) * net.length

    compare(Setting("length"), loss_of, "step")
