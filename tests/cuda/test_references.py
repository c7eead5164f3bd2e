"""Plain PyTorch on the host has a GPU's bits where its kernels are computed by one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import references
from tests.cuda import standin
from tests.devices import on_real_gpus

pytestmark = on_real_gpus

GPU = torch.device("cuda", 0)


@pytest.fixture
def own_bits() -> Iterator[None]:
    """Let the stand-in have last bits that are not the host's, as a GPU has."""
    if standin.is_loaded():
        standin.have_own_bits(True)
    yield
    if standin.is_loaded():
        standin.have_own_bits(False)


class Many(nn.Module):
    """Convolution, BatchNorm, an LSTM, attention, dropout and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.lstm, self.out = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.norm(self.conv(x))).transpose(1, 2)
        h, _ = self.lstm(h)
        h = F.scaled_dot_product_attention(h, h, F.dropout(h, 0.2, self.training))
        h = h + 0.1 * torch.randn_like(h) + 0.1 * torch.rand(h.shape, device=h.device)
        return self.out(h * (1 + torch.rand(()).item()))


def trained(net: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Train on a device, with an optimizer on the host; return all that is left of it."""
    x, y = torch.linspace(-1, 1, 4 * 4 * 6).view(4, 4, 6), torch.arange(4 * 6).view(4, 6) % 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(3):
        torch.manual_seed(step)
        net.to(device)
        loss = F.cross_entropy(net(x.to(device)).flatten(0, 1), y.to(device).flatten())
        optimizer.zero_grad()
        loss.backward()
        net.cpu()
        optimizer.step()
        found.append(loss.detach().cpu())
        found += [p.grad.clone() for p in net.parameters()]
    return [*found, *net.state_dict().values()]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_gpu_computes_for_the_host_has_its_bits(own_bits: None, there: bool) -> None:
    """All of it, with what is drawn, and it is not what the host computes."""
    torch.manual_seed(0)
    net = Many()
    plain = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an LSTM's weights that do not lie side by side
        wanted = trained(net, GPU)
        with references.computed_on(GPU) if there else nullcontext():
            found = trained(plain, torch.device("cpu"))
    assert all(map(torch.equal, found, wanted)) == there


class Squash(torch.optim.Optimizer):
    """Takes the hyperbolic tangent of its parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            param.copy_(param.tanh())


def test_what_optimizers_compute_on_the_host_stays_there(own_bits: None) -> None:
    values = torch.linspace(-3, 3, 1001)
    param = nn.Parameter(values.clone())
    with references.computed_on(GPU):
        Squash([param], {}).step()
        there = values.tanh()
    assert torch.equal(param, values.tanh())
    assert not torch.equal(there, values.tanh())
