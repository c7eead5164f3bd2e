"""Hooks on tensors that a forward registers: as often, and on what, as in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs


class Hooked(nn.Module):
    """Looks at the gradient of what its first half makes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 4)
        self.way = way
        self.norms: list[float] = []
        self.kept: Any = None

    def keep(self, grad: torch.Tensor) -> None:
        self.kept = grad.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        if h.requires_grad:
            if self.way == "list":
                norms = self.norms
                h.register_hook(lambda grad: norms.append(float(grad.norm())))
            elif self.way == "method":
                h.register_hook(self.keep)
            elif self.way == "scaled":
                h.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
            else:
                h.retain_grad()
                self.kept = h
        out: torch.Tensor = self.head(h)
        return out

    def seen(self) -> list[Any]:
        kept = self.kept.grad if self.way == "retained" else self.kept
        return [*self.norms, *([] if kept is None else kept.flatten().tolist())]


@pytest.mark.parametrize("way", ["list", "method", "scaled"])
def test_a_hook_on_a_tensor_is_called_once_a_step(vgpus: VirtualGPUs, way: str) -> None:
    """One that keeps norms was called 53 times in three steps, mostly on made-up values."""
    net, twin = pair(way)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1, "fused": False},
        loss_fn=F.cross_entropy,
        devices=1,
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for inputs, targets in batches():
        loss = model.train_step(inputs, targets)
        optimizer.zero_grad()
        expected = F.cross_entropy(twin(inputs), targets)
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
        assert net.seen() == twin.seen()


@pytest.mark.parametrize("way", ["list", "method", "scaled"])
def test_so_it_is_in_a_loop_of_ones_own(vgpus: VirtualGPUs, way: str) -> None:
    net, twin = pair(way)
    model: Callable[..., torch.Tensor] = harmony.Harmony(net, devices=1)
    for inputs, targets in batches():
        for called in (model, twin):
            F.cross_entropy(called(inputs), targets).backward()
        assert net.seen() == twin.seen()
        for param, other in zip(net.parameters(), twin.parameters(), strict=True):
            assert param.grad is not None and other.grad is not None
            assert torch.equal(param.grad, other.grad)


def pair(way: str) -> tuple[Hooked, Hooked]:
    torch.manual_seed(0)
    net = Hooked(way)
    return net, copy.deepcopy(net)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 8), torch.randint(0, 4, (6,))) for _ in range(3)]
