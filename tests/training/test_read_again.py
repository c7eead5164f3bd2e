"""A loop of one's own that changes weights between a forward and its backward.

Plain PyTorch computes gradients then of which some belong to the old weights and some to the new.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import harmony
from harmony.engine.read_again import fingerprint
from tests.training.conftest import VirtualGPUs
from tests.training.models import square_loss

Act = Callable[[nn.Module], object]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 96), nn.Linear(96, 4))
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.scale


def weight(net: nn.Module) -> nn.Parameter:
    return net.get_parameter("body.2.weight")


def scale(net: nn.Module) -> torch.Tensor:
    return net.get_buffer("scale")


def halved(array: object) -> None:
    array[:] *= 0.5  # type: ignore[index]


def swap_rows(array: object) -> None:
    array[[0, 1]] = array[[1, 0]]  # type: ignore[index]


def train(module: nn.Module, act: Act, steps: int = 4) -> list[torch.Tensor]:
    """Train; from the third step on do something between forward and backward."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        x, y = torch.randn(4, 8), torch.randn(4, 4)
        loss = square_loss(module(x), y)
        if step >= 2:
            act(module)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in module.parameters()]


WRITES: dict[str, tuple[str, Act]] = {
    "data": ("parameter body.2.weight", lambda net: weight(net).data.mul_(0.5)),
    "one element": ("parameter body.2.weight", lambda net: weight(net).data[3, 4].add_(1e-6)),
    "data, set": ("parameter body.2.weight", lambda net: setattr(weight(net), "data", zeros())),
    "array": ("parameter body.2.weight", lambda net: halved(weight(net).detach().numpy())),
    "places": ("parameter body.2.weight", lambda net: swap_rows(weight(net).detach().numpy())),
    "buffer": ("buffer scale", lambda net: scale(net).data.mul_(0.5)),
    "buffer's array": ("buffer scale", lambda net: halved(scale(net).numpy())),
}


def zeros() -> torch.Tensor:
    return torch.zeros(96, 96)


@pytest.mark.parametrize("write", WRITES)
def test_what_changes_behind_the_counters_is_refused(vgpus: VirtualGPUs, write: str) -> None:
    named, act = WRITES[write]
    net = Scaled()
    model = harmony.Harmony(net, microbatch_size=2)
    with pytest.raises(harmony.HarmonyError, match=rf"{named} had been changed \(through its"):
        train(model, lambda _: act(net))
    train(model, lambda _: None, steps=1)  # the next one is as good as any


def test_memory_that_somebody_had_before_the_forward(vgpus: VirtualGPUs) -> None:
    net = Scaled()
    model = harmony.Harmony(net)
    train(model, lambda _: None)
    held = weight(net).detach().numpy()
    with pytest.raises(harmony.HarmonyError, match=r"body\.2\.weight had been changed \(through"):
        train(model, lambda _: halved(held))


def test_who_only_looks_trains_on(vgpus: VirtualGPUs) -> None:
    def look(net: nn.Module) -> None:
        for param in net.parameters():
            param.data.norm()
            param.detach().numpy().sum()
        net.state_dict()

    net = Scaled()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, microbatch_size=4)
    for expected, found in zip(train(plain, look), train(model, look), strict=True):
        assert torch.equal(expected, found)


def test_parameters_are_watched_only_while_a_forward_waits(vgpus: VirtualGPUs) -> None:
    net = Scaled()
    train(harmony.Harmony(net), lambda _: None)
    weight(net).detach()
    assert "detach" not in vars(nn.Parameter)


@pytest.mark.parametrize("numel", [0, 5, 1024, 80_000, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_fingerprint_tells_one_element_and_two_places(numel: int, dtype: torch.dtype) -> None:
    tensor = (torch.arange(numel) % 7 % 2).to(dtype)
    assert torch.equal(fingerprint(tensor), fingerprint(tensor.clone()))
    for at in {0, numel // 2, numel - 1} if numel else ():
        other = tensor.clone()
        other[at] = 1 - int(other[at])
        assert not torch.equal(fingerprint(tensor), fingerprint(other))
    if numel > 1:
        other = tensor.clone()
        other[:2] = tensor[:2].flip(0)
        assert not torch.equal(fingerprint(tensor), fingerprint(other))
