"""State of Python's own objects that no attribute shows, and torch's functions, are read too."""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import ctypes
import functools
import multiprocessing
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony

from .conftest import VirtualGPUs

Case = tuple[Callable[[], float], Callable[[float], None]]


class Scale(nn.Module):
    """A layer whose factor is read from somewhere."""

    def __init__(self, read: Callable[[], float]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) * self.read()
        return out


class Key:
    value = 1.0


def context_variable() -> Case:
    held = contextvars.ContextVar("held", default=1.0)
    return lambda: held.get(), lambda value: held.set(value) and None


def thread_local() -> Case:
    held = threading.local()
    held.value = 1.0
    return lambda: held.value, lambda value: setattr(held, "value", value)


def weak_dictionary() -> Case:
    key, held = Key(), weakref.WeakKeyDictionary[Any, float]()
    held[key] = 1.0
    return lambda: held[key], lambda value: held.update({key: value})


def weak_reference() -> Case:
    held = Key()
    held.value = 1.0
    reference = weakref.ref(held)
    return lambda: reference().value, lambda value: setattr(held, "value", value)


def user_dictionary() -> Case:
    held = collections.UserDict(value=1.0)
    return lambda: held["value"], lambda value: held.update(value=value)


def chain() -> Case:
    inner = {"value": 1.0}
    held = collections.ChainMap({}, inner)
    return lambda: held["value"], lambda value: inner.update(value=value)


def proxy() -> Case:
    inner = {"value": 1.0}
    held = types.MappingProxyType(inner)
    return lambda: held["value"], lambda value: inner.update(value=value)


def typed_array() -> Case:
    held = array.array("d", [1.0])
    return lambda: held[0], lambda value: held.__setitem__(0, value)


def number_of_c() -> Case:
    held = ctypes.c_double(1.0)
    return lambda: held.value, lambda value: setattr(held, "value", value)


def shared_value() -> Case:
    held = multiprocessing.Value("d", 1.0)
    return lambda: held.value, lambda value: setattr(held, "value", value)


def event() -> Case:
    held = threading.Event()
    return lambda: 2.0 if held.is_set() else 1.0, lambda _: held.set()


def cached_function() -> Case:
    settings = {"value": 1.0}

    @functools.lru_cache
    def read() -> float:
        return settings["value"]

    def change(value: float) -> None:
        settings["value"] = value
        read.cache_clear()

    return lambda: read(), change


CASES = [context_variable, thread_local, weak_dictionary, weak_reference, user_dictionary, chain]
CASES += [proxy, typed_array, number_of_c, shared_value, event, cached_function]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_python_itself_keeps_is_read_in_every_step(vgpus: VirtualGPUs, case: Any) -> None:
    """All of these were frozen at what they held in the first step."""
    read, change = case()
    assert_as_plain(Scale(read), lambda: change(2.5))


def test_a_function_of_torch_that_is_replaced_is_called(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Smooth(Scale):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.softplus(self.linear(x))

    known = F.softplus

    def change() -> None:
        monkeypatch.setattr(F, "softplus", lambda x: 3 * known(x))

    assert_as_plain(Smooth(lambda: 1.0), change)


def assert_as_plain(net: nn.Module, change: Callable[[], None]) -> None:
    """Compare a step before, and one after the change, with plain PyTorch: all bits are equal."""
    twin = copy.copy(net)  # shares what is read, not what is trained
    twin._modules = {"linear": copy.deepcopy(net.linear)}
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.1, "fused": False},
        loss_fn=F.cross_entropy,
        devices=1,
    )
    inputs, targets = torch.randn(6, 8), torch.randint(0, 4, (6,))
    for index in range(2):
        loss = model.train_step(inputs, targets)
        optimizer.zero_grad()
        expected = F.cross_entropy(twin(inputs), targets)
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach()), index
        if index == 0:
            change()
