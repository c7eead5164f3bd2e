"""Modules, parameters and buffers that change places, or come back, between steps.

The names and shapes are the same afterwards, and the memory is too: what one of them has must not
be written over by another that comes into its place.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import harmony
from tests.training.changing import FORMS, Change, assert_same, same_with_changes
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss, vector_batch

WIDTH = 24


class Net(nn.Module):
    """Two blocks of one form, a pair of parameters and a pair of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(3)
        )
        self.gain = nn.Parameter(torch.linspace(0.5, 1, WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("low", torch.full((WIDTH,), 0.1))
        self.register_buffer("high", torch.full((WIDTH,), 0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x * self.gain * self.high + self.bias + self.low


def exchange_blocks(net: nn.Module, _: object) -> None:
    net.blocks[0], net.blocks[2] = net.blocks[2], net.blocks[0]


def exchange_norms(net: nn.Module, _: object) -> None:
    net.blocks[0][1], net.blocks[1][1] = net.blocks[1][1], net.blocks[0][1]


def rotate(net: nn.Module, _: object) -> None:
    net.blocks = nn.ModuleList([*net.blocks[1:], net.blocks[0]])


def exchange_parameters(net: nn.Module, _: object) -> None:
    net.gain, net.bias = net.bias, net.gain


def exchange_buffers(net: nn.Module, _: object) -> None:
    net.low, net.high = net.high, net.low


def keep_aside(net: nn.Module, _: object) -> None:
    net.__dict__["aside"] = net.blocks[1]
    net.blocks[1] = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    with torch.no_grad():
        for param in net.blocks[1].parameters():
            param.fill_(0.1)
    net.blocks[1].requires_grad_(False)


def put_back(net: nn.Module, _: object) -> None:
    net.blocks[1] = net.__dict__.pop("aside")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changes",
    [
        {1: exchange_blocks, 3: exchange_norms},
        {1: rotate, 2: rotate},
        {1: exchange_parameters, 2: exchange_buffers, 3: exchange_parameters},
        {1: keep_aside, 3: put_back},
    ],
    ids=["blocks", "rotated", "tensors", "put back"],
)
def test_what_changes_places_keeps_its_values(
    vgpus: VirtualGPUs, form: str, changes: dict[int, Change]
) -> None:
    same_with_changes(Net(), changes, form)


def test_swapped_tensors(vgpus: VirtualGPUs) -> None:
    """`torch.utils.swap_tensors` takes none that somebody has a weak reference to."""

    def train(net: nn.Module, module: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for step in range(4):
            optimizer.zero_grad()
            loss = square_loss(module(vector_batch(step)[0]), vector_batch(step)[1])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            del loss
            if step == 1:
                torch.utils.swap_tensors(net.blocks[0][0].weight, net.blocks[1][0].weight)
        return losses

    plain = Net()
    net = copy.deepcopy(plain)
    model = harmony.Harmony(net, devices=1, microbatch_size=len(vector_batch(0)[0]))
    assert train(net, model) == train(plain, plain)
    assert_same(net, plain, "at the end")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_held_is_not_written_over(vgpus: VirtualGPUs, precision: str) -> None:
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    model = harmony.Harmony(net, devices=1, microbatch_size=8, precision=precision)
    x, _ = vector_batch(0)
    model(x).sum().backward()
    held = dict(net.named_parameters())
    before = {name: param.detach().clone() for name, param in held.items()}
    ones = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(ones, assign=True)
    model(x).sum().backward()
    for name, param in held.items():
        assert torch.equal(param, before[name]), name
    for name, param in net.named_parameters():
        assert torch.equal(param, torch.ones_like(param)), name


def test_memory_that_nobody_has_is_used_again(vgpus: VirtualGPUs) -> None:
    net = Net()
    model = harmony.Harmony(net, devices=1, microbatch_size=8)
    x, _ = vector_batch(0)
    sizes = []
    for step in range(6):
        model(x).sum().backward()
        gc.collect()
        sizes.append(sum(arena.nbytes for arena in model._engine.variants._factory.arenas))
        net.zero_grad()
        rotate(net, step)
    assert max(sizes) <= 2 * sizes[0]
