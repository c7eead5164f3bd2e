"""What a forward changes of its arguments is changed for the caller too, or refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .effects import both, train

WAYS = ("step", "loop")
warns = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    """Does something to its argument before it computes."""

    def __init__(self, change: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.change = change

    def forward(self, given: Any) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.first(self.change(given))))
        return out


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


def masked(x: torch.Tensor) -> torch.Tensor:
    x[x < 0] = 0
    return x


def view(x: torch.Tensor) -> torch.Tensor:
    x[:, 1:3].add_(1)
    return x


def by_function(x: torch.Tensor) -> torch.Tensor:
    torch.clamp(x, max=0.5, out=x)
    return x


def labels(given: list[torch.Tensor]) -> torch.Tensor:
    given[1].masked_fill_(given[1] > 2, 0)
    return given[0] + given[1][:, None] * 0.1


def vectors(count: int = 3) -> list[tuple[Any, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(8, 8), torch.arange(8) % 4) for _ in range(count)]


@warns
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [whole, masked, view, by_function])
def test_an_input_that_is_changed_in_place_is_the_callers(
    vgpus: VirtualGPUs, change: Any, way: str, gpus: int
) -> None:
    vgpus(count=gpus)
    torch.manual_seed(0)
    both(Net(change), vectors(), F.cross_entropy, way)


@warns
@pytest.mark.parametrize("way", WAYS)
def test_integers_in_a_list_are_changed_too(vgpus: VirtualGPUs, way: str) -> None:
    torch.manual_seed(0)
    batches = [([x, torch.arange(8) % 5], y) for x, y in vectors()]
    _, after = both(Net(labels), batches, F.cross_entropy, way)
    assert int(after[0][0][1].max()) == 2


@warns
def test_microbatches_write_their_rows(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    both(Net(whole), vectors(), F.cross_entropy, "step", microbatch_size=2)


@warns
def test_a_view_of_a_larger_tensor_is_changed_there(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    large = torch.ones(16, 8)
    model = harmony.Harmony(Net(whole))
    model(large[4:12]).sum().backward()
    assert large[:4].eq(1).all() and large[4:12].eq(2).all() and large[12:].eq(1).all()


@warns
def test_an_input_is_changed_without_gradients_as_well(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    x = torch.ones(8, 8)
    with torch.no_grad():
        harmony.Harmony(Net(whole))(x)
    assert x.eq(2).all()


@warns
def test_targets_that_the_loss_changes_are_the_callers(vgpus: VirtualGPUs) -> None:
    def loss_fn(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(out, y.masked_fill_(y > 2, -100))

    torch.manual_seed(0)
    _, after = both(Net(lambda x: x), vectors(), loss_fn, "step")
    assert int(after[0][1].min()) == -100


@warns
def test_an_input_that_requires_a_gradient_is_refused(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    x = (torch.ones(8, 8, requires_grad=True)) * 1.0
    with pytest.raises(harmony.HarmonyError, match=r"changes an input .* clone"):
        harmony.Harmony(Net(whole))(x)


def popped(given: Any) -> torch.Tensor:
    x: torch.Tensor = given.pop("x")
    return x


def stored(given: Any) -> torch.Tensor:
    given["extra"] = given["x"] * 2
    x: torch.Tensor = given["x"]
    return x


def appended(given: Any) -> torch.Tensor:
    given["more"].append(1)
    x: torch.Tensor = given["x"]
    return x


def attribute(given: Any) -> torch.Tensor:
    given["more"][0].seen = True
    x: torch.Tensor = given["x"]
    return x


@warns
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [popped, stored, appended, attribute])
def test_a_container_that_is_changed_is_refused_by_name(
    vgpus: VirtualGPUs, change: Any, way: str
) -> None:
    thing = SimpleNamespace(seen=False)
    given = [{"x": torch.ones(8, 8), "more": [thing]}]
    net = Net(lambda held: change(held[0]))
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    model = harmony.Harmony(
        net, **(options | {"loss_fn": F.cross_entropy} if way == "step" else {})
    )
    with pytest.raises(harmony.HarmonyError, match=r"changes args\[0\].* copy"):
        train(model, net, [(given, torch.arange(8) % 4)], F.cross_entropy, way)
    assert list(given[0]) == ["x", "more"] and given[0]["more"] == [thing] and not thing.seen


@pytest.mark.parametrize("way", WAYS)
def test_an_input_that_comes_to_require_a_gradient_is_refused(
    vgpus: VirtualGPUs, way: str
) -> None:
    net = Net(lambda x: x.requires_grad_())
    options: Any = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    model = harmony.Harmony(
        net, **(options | {"loss_fn": F.cross_entropy} if way == "step" else {})
    )
    with pytest.raises(harmony.HarmonyError, match=r"test_changed_arguments.*requires_grad_"):
        train(model, net, vectors(1), F.cross_entropy, way)
