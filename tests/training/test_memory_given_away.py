"""Memory of parameters and buffers that something else holds: exchanged, kept, taken before."""

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
from .mixed import in_bf16

Forward = Callable[[nn.Module, torch.Tensor], Any]


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def steps(net: nn.Module, forward: Forward, first: int, count: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(4, 16, generator=generator)
        y = torch.randint(0, 4, (4,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(net, x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def exchanged(net: nn.Module, forward: Forward) -> list[float]:
    """Weights and their average change places for an evaluation, and back."""
    losses = steps(net, forward, 0)
    average = [param.detach().clone() for param in net.parameters()]
    losses += steps(net, forward, 2)
    for training in (False, True):
        for param, value in zip(net.parameters(), average, strict=True):
            param.data, value.data = value.data, param.data
        net.train(training)
        if not training:
            with torch.no_grad():
                losses.append(float(forward(net, torch.ones(4, 16)).float().sum()))
    return losses + steps(net, forward, 4)


def kept_and_given_back(net: nn.Module, forward: Forward) -> list[float]:
    """As averages of weights do: the memory is kept, other values are shown, and it comes back."""
    losses = steps(net, forward, 0)
    kept = [param.data for param in net.parameters()]
    for param in net.parameters():
        param.data = param.data * 0.5
    with torch.no_grad():
        losses.append(float(forward(net, torch.ones(4, 16)).float().sum()))
    for param, values in zip(net.parameters(), kept, strict=True):
        param.data = values
    return losses + steps(net, forward, 2)


def kept_for_later(net: nn.Module, forward: Forward) -> list[float]:
    """What the weights were, to compare with."""
    losses = steps(net, forward, 0)
    kept = [param.data for param in net.parameters()]
    for param in net.parameters():
        param.data = torch.zeros_like(param)
    losses += steps(net, forward, 2)
    return losses + [float(values.sum()) for values in kept]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", [exchanged, kept_and_given_back, kept_for_later])
def test_what_something_else_holds_is_not_overwritten(
    vgpus: VirtualGPUs, way: Callable[[nn.Module, Forward], list[float]], precision: str
) -> None:
    net = small()
    twin = copy.deepcopy(net)
    plain: Forward = in_bf16 if precision == "bf16" else nn.Module.__call__
    expected = way(twin, plain)
    model = harmony.Harmony(net, microbatch_size=4, precision=precision)
    assert way(net, lambda module, x: model.train(module.training)(x)) == expected
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_a_buffer_that_was_put_aside_keeps_its_values(vgpus: VirtualGPUs) -> None:
    class Scaled(nn.Module):
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.register_buffer("scale", torch.full((16,), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x * self.scale)
            return out

    net = Scaled()
    model = harmony.Harmony(net, microbatch_size=4)
    steps(net, lambda _, x: model(x), 0)
    aside = net.scale
    net.scale = torch.full((16,), 2.0)
    steps(net, lambda _, x: model(x), 2)
    assert aside.tolist() == [0.5] * 16
    net.scale = aside
    twin = copy.deepcopy(net)
    found, expected = steps(net, lambda _, x: model(x), 4), steps(twin, nn.Module.__call__, 4)
    assert found == expected


@pytest.mark.parametrize(
    "taken",
    [
        lambda net: [param.data for param in net.parameters()],
        lambda net: net[0].weight.detach()[0],
        lambda net: net[0].weight.detach().numpy(),
        lambda net: net.state_dict(),
    ],
    ids=["data", "a row", "numpy", "state_dict"],
)
def test_memory_that_was_taken_before_the_first_batch_is_named(
    vgpus: VirtualGPUs, taken: Callable[[Any], Any]
) -> None:
    net = small()
    held = taken(net)
    named = r"holds the memory that 0\.weight (and \d more )?had"
    with pytest.warns(harmony.HarmonyWarning, match=named):
        steps(net, lambda _, x: harmony.Harmony(net)(x), 0, count=1)
    del held


def test_weights_that_are_views_of_one_memory_are_nobody_elses(
    vgpus: VirtualGPUs, recwarn: pytest.WarningsRecorder
) -> None:
    """As files of weights are read: one memory, and each parameter a part of it."""
    net = small()
    flat = torch.cat([param.detach().flatten() for param in net.parameters()])
    sizes = [param.numel() for param in net.parameters()]
    for param, part in zip(net.parameters(), flat.split(sizes), strict=True):
        param.data = part.view(param.shape)
    del flat, part, param
    model = harmony.Harmony(net)
    steps(net, lambda _, x: model(x), 0, count=1)
    assert not [w for w in recwarn if "holds the memory" in str(w.message)]


class Tied(nn.Module):
    """Two layers, and a buffer, that can be given one memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.register_buffer("shown", torch.zeros(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))) + x @ self.shown)


def by_data(net: Tied) -> None:
    net.two.weight.data = net.one.weight.data


def by_a_part(net: Tied) -> None:
    memory = torch.randn(24, 16)
    net.one.weight.data, net.two.weight.data = memory[:16], memory[8:]


def by_a_buffer(net: Tied) -> None:
    net.shown = net.one.weight.data


def not_at_all(net: Tied) -> None:
    pass


def by_frozen_data(net: Tied) -> None:
    by_data(net)
    net.one.requires_grad_(False)
    net.two.requires_grad_(False)


def side_by_side(net: Tied) -> None:
    memory = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    net.one.weight.data, net.two.weight.data = memory[:16], memory[16:]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("tie", [by_data, by_a_part, by_a_buffer])
def test_two_tensors_in_one_memory_of_which_one_is_trained_are_refused(
    vgpus: VirtualGPUs, tie: Callable[[Tied], None], later: bool
) -> None:
    model = harmony.Harmony(net := Tied(), devices=2)
    if later:
        steps(net, lambda _, x: model(x), 0)
    tie(net)
    with pytest.raises(harmony.HarmonyError, match="two tensors in the same memory"):
        steps(net, lambda _, x: model(x), 2)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("tie", [not_at_all, by_frozen_data, side_by_side])
def test_tensors_that_share_no_trained_memory_train_as_in_plain_pytorch(
    vgpus: VirtualGPUs, tie: Callable[[Tied], None], later: bool
) -> None:
    losses = []
    for devices in (0, 2):
        net = Tied()
        model = harmony.Harmony(net, devices=devices, microbatch_size=4) if devices else net
        before = steps(net, lambda _, x: model(x), 0) if later else []  # noqa: B023
        tie(net)
        losses.append(before + steps(net, lambda _, x: model(x), 2))  # noqa: B023
    assert losses[0] == losses[1]
