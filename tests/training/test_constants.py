"""Constants that the forward makes: they are where the layer that reads them runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .conftest import VirtualGPUs
from .side_by_side import assert_same_training

VALUES = [0.1 * i for i in range(8)]


class Scaled(nn.Module):
    """Two layers, the first of which reads a constant of the forward's own."""

    def __init__(self, constant: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("steps", torch.arange(8.0))
        self.constant = constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x * self.constant(self, x))))


class Whole(nn.Module):
    """The same as one layer among others."""

    def __init__(self, constant: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Scaled(constant), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def under_a_device(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.device(x.device):
        return torch.tensor(VALUES) + torch.ones(8)


def by_its_own_generator(net: Any, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(3)
    return torch.rand(8, generator=generator, device=x.device)


CONSTANTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "as_tensor, moved": lambda net, x: torch.as_tensor(VALUES).to(device=x.device, dtype=x.dtype),
    "as_tensor, as another": lambda net, x: torch.as_tensor(VALUES).to(x),
    "as_tensor, moved twice": lambda net, x: torch.as_tensor(VALUES).to(x.device).type_as(x),
    "device by name": lambda net, x: torch.tensor(VALUES, device=str(x.device)),
    "device by its type": lambda net, x: torch.ones(8, device=x.device.type),
    "made on the CPU": lambda net, x: torch.arange(8, device="cpu").float().to(x.device),
    "moved by name": lambda net, x: torch.FloatTensor(VALUES).to(str(x.device)),
    "default device": lambda net, x: torch.ones(8, device=torch.get_default_device()).to(x),
    "asarray": lambda net, x: torch.asarray(VALUES, device=x.device),
    "new_tensor": lambda net, x: x.new_tensor(VALUES),
    "as a buffer": lambda net, x: torch.full((8,), 2.0, device=net.steps.device) + net.steps,
    "window": lambda net, x: torch.hann_window(8).to(x.device),
    "cuda where there is one": lambda net, x: (
        torch.tensor(VALUES).cuda() if x.is_cuda else torch.tensor(VALUES)
    ),
    "changed in place": lambda net, x: torch.as_tensor(VALUES).to(x.device).add_(net.steps),
    "one hot": lambda net, x: F.one_hot(torch.as_tensor([1, 3]).to(x.device), 8).to(x.dtype)[0],
    "under a device": under_a_device,
    "by its own generator": by_its_own_generator,
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_of_the_forward_is_where_it_is_read(name: str, vgpus: VirtualGPUs) -> None:
    """The script ``constant_on_device``: what was on the CPU when traced stayed there."""
    torch.manual_seed(0)
    batches = [((torch.randn(4, 8),), torch.randint(0, 4, (4,))) for _ in range(2)]
    assert_same_training(Scaled(CONSTANTS[name]), batches)


@pytest.mark.parametrize("name", ["as_tensor, moved", "as_tensor, as another", "device by name"])
def test_a_constant_inside_of_a_layer_is_where_it_runs(name: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    batches = [((torch.randn(4, 8),), torch.randint(0, 4, (4,))) for _ in range(2)]
    assert_same_training(Whole(CONSTANTS[name]), batches)


def test_a_live_forward_makes_its_constants_on_the_device(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)

    def constant(net: Any, x: torch.Tensor) -> torch.Tensor:
        made = torch.as_tensor(VALUES).to(x.device)
        return made if torch.rand(()) < 0.5 else made * 2

    batches = [((torch.randn(4, 8),), torch.randint(0, 4, (4,))) for _ in range(2)]
    assert assert_same_training(Scaled(constant), batches).capture_mode == "dynamic"
