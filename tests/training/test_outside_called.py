"""A value from outside is read as it is now, whoever calls the Python that reads it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from harmony.capture.guards import observe

from .conftest import VirtualGPUs
from .test_outside import check_step, trained, wrapped

GAINS = {"now": 1.0}
Way = Callable[[torch.Tensor], torch.Tensor]


def gain() -> float:
    return GAINS["now"]


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * gain()


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.by = gain()
        return x * ctx.by

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * ctx.by


class Scaling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return scaled(out) if func is torch.tanh else out


def in_a_mode(x: torch.Tensor) -> torch.Tensor:
    with Scaling():
        return torch.tanh(x)


WAYS: dict[str, Way] = {
    "custom function": lambda x: Scaled.apply(x),
    "checkpoint": lambda x: checkpoint(scaled, x, use_reentrant=False),
    "vmap": lambda x: torch.vmap(scaled)(x),
    "mode": in_a_mode,
    "map": lambda x: torch.stack(list(map(scaled, x.unbind()))),
    "reduce": lambda x: (
        functools.reduce(lambda a, row: a + scaled(row), x.unbind(1)).unsqueeze(1) + x
    ),
    "sort": lambda x: x * sorted([1.0, 2.0], key=lambda v: abs(v - gain()))[0],
}


class Block(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(8, 8), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(torch.tanh(self.linear(x)))


class Net(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(way), Block(way))
        self.head, self.way = nn.Linear(8, 4), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.way(self.blocks(x)))


@pytest.mark.parametrize("dropin", [False, True], ids=["step", "drop-in"])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_called_by_torch_or_python_is_heard(
    name: str, dropin: bool, vgpus: VirtualGPUs
) -> None:
    torch.manual_seed(0)
    net = Net(WAYS[name])
    model = wrapped(net) if dropin else trained(net, F.cross_entropy)
    for step, value in enumerate((1.0, 2.0, 1.0)):
        GAINS["now"] = value
        check_step(model, net, F.cross_entropy, step, dropin)


def test_a_hook_of_a_layer_is_heard(vgpus: VirtualGPUs) -> None:
    net = Net(lambda x: x)
    for block in net.blocks:
        block.linear.register_forward_hook(lambda module, args, out: scaled(out))
    model = trained(net, F.cross_entropy)
    for step, value in enumerate((1.0, 2.0, 1.0)):
        GAINS["now"] = value
        check_step(model, net, F.cross_entropy, step, dropin=False)


LISTENERS = [observe._profiling]
if observe._MONITORING is not None:
    LISTENERS.append(observe._monitoring)


@pytest.mark.parametrize("listens", LISTENERS)
def test_either_listener_hears_the_same(listens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if listens is observe._profiling:
        monkeypatch.setattr(observe, "_MONITORING", None)

    @observe.unheard
    def quiet(call: Callable[[], object]) -> None:
        scaled(torch.ones(1))
        observe.heard(call)

    file = Path(__file__)

    def rows() -> Any:
        yield gain()
        yield file.stat()

    begun = rows()
    next(begun)
    with observe.observing() as outer:
        list(begun)  # a generator that is older
        with observe.observing() as inner:
            inside = threading.Thread(target=in_a_mode, args=(torch.ones(1),))
            inside.start()
            inside.join()
            quiet(gain)
        gain()
        for _ in range(2):
            file.stat()
    scaled(torch.ones(1))
    of_test = {code.co_name for code in inner.codes if code.co_filename == __file__}
    # Monitoring hears each code once: nothing is won by leaving out Harmony's own.
    assert of_test - {"quiet", "scaled"} == {"gain"}
    assert listens is observe._monitoring or of_test == {"gain"}
    assert {"rows", "gain"} <= {code.co_name for code in outer.codes}
    assert list(outer.unguardable) == ["the file system (stat)"]
    assert not inner.unguardable
