"""A part of a wrapped module that is called by itself computes past Harmony: it is said once."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import harmony

from .changing import assert_same
from .conftest import VirtualGPUs
from .models import GPT, square_loss, token_batch, token_loss, vector_batch


class AutoEncoder(nn.Module):
    """Has a method that is a part of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(24, 8), nn.LayerNorm(8))
        self.act = nn.Tanh()
        self.dec = nn.Linear(8, 24)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.dec(self.act(z))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.enc(x))


def wrapped(net: nn.Module, **settings: Any) -> harmony.Harmony:
    return harmony.Harmony(net, microbatch_size=8, devices=1, **settings)


@contextmanager
def said() -> Iterator[list[str]]:
    """What is said of calls past Harmony."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message).split(" was called")[0] for w in caught if "by itself" in str(w)]
    places = {w.filename for w in caught if "by itself" in str(w)}
    assert places <= {__file__}, "the caller's line is shown"


def test_each_part_is_named_once_and_trains_as_in_plain_pytorch(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = AutoEncoder()
    plain = copy.deepcopy(net)
    model = wrapped(net)
    x, y = vector_batch(0)
    with said() as messages:
        for module in (plain, model):
            for _ in range(2):
                loss = module.decode(module.enc(x)) + module(x)
                square_loss(loss, y).backward()
    assert messages == ["AutoEncoder.enc", "AutoEncoder.dec"]
    assert_same(net, plain, "in the end")
    for (name, one), two in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-7), name


def test_a_backbone_with_its_head_is_named(vgpus: VirtualGPUs) -> None:
    net = GPT(dropout=0.0, tied=True)
    model = wrapped(net)
    ids, targets = token_batch(0)
    token_loss(model(ids), targets).backward()
    with said() as messages, torch.no_grad():
        hidden = model.blocks[0](model.tokens(ids))
        model.head(model.norm(hidden))
        net.norm(hidden)
        net(ids)
    parts = ["GPT.tokens", "GPT.blocks.0", "GPT.norm", "GPT.head"]
    assert messages == [*parts, "the wrapped module"]


def test_gradients_that_a_step_would_lose_are_refused(vgpus: VirtualGPUs) -> None:
    net = AutoEncoder()
    model = wrapped(net, optimizer=torch.optim.SGD, loss_fn=square_loss)
    x, y = vector_batch(0)
    model.train_step(x, y)
    with pytest.raises(harmony.HarmonyError, match=r"AutoEncoder\.dec was called by itself, with"):
        model.decode(torch.randn(8, 8))
    with said() as messages, torch.no_grad():
        model.decode(torch.randn(8, 8))
        model.act(torch.randn(8, 8))
    assert messages == ["AutoEncoder.dec"]
    model.train_step(x, y)


def test_what_is_no_call_past_harmony_is_not_said(vgpus: VirtualGPUs) -> None:
    net = AutoEncoder()
    model = wrapped(net)
    x, y = vector_batch(0)
    with said() as messages:
        square_loss(model(x), y).backward()
        with torch.no_grad():
            model(x)
            average = copy.deepcopy(net)
            for one, two in zip(average.parameters(), net.parameters(), strict=True):
                one.lerp_(two, 0.1)
            average.decode(torch.randn(2, 8))
            pickle.loads(pickle.dumps(average)).decode(torch.randn(2, 8))
            net.dec.reset_parameters()
            torch.jit.trace(net.dec, torch.randn(2, 8))
    assert messages == []


def test_parts_that_were_replaced_are_watched_too(vgpus: VirtualGPUs) -> None:
    net = AutoEncoder()
    model = wrapped(net)
    x, _ = vector_batch(0)
    model(x)
    net.dec = nn.Linear(8, 24)
    for _ in range(2):
        model(x)
    with said() as messages, torch.no_grad():
        net.dec(torch.randn(2, 8))
    assert messages == ["AutoEncoder.dec"]


@pytest.mark.parametrize("closed", [False, True])
def test_the_module_is_plain_again_when_the_model_is_gone(
    vgpus: VirtualGPUs, closed: bool
) -> None:
    net = AutoEncoder()
    model: harmony.Harmony | None = wrapped(net)
    assert model is not None
    model(vector_batch(0)[0])
    if closed:
        model.close()
    else:
        model = None
        gc.collect()
    with said() as messages:
        net(vector_batch(0)[0]).sum().backward()
    assert messages == []
    assert all("_compiled_call_impl" not in module.__dict__ for module in net.modules())


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * 2


@pytest.mark.parametrize("way", ["model", "method", "function"])
def test_a_compiled_model_just_runs(vgpus: VirtualGPUs, way: str) -> None:
    torch.manual_seed(0)
    net = Doubled()
    plain = copy.deepcopy(net)
    model = wrapped(net)
    call: Any = torch.compile(model)
    if way == "method":
        model.compile()
        call = model
    elif way == "function":
        call = torch.compile(lambda x: model(x), backend="eager")
    x, y = vector_batch(0)
    for module in (plain, call):
        square_loss(module(x), y).backward()
        with torch.no_grad():
            assert torch.equal(module(x), plain(x))
    assert model.num_steps == 1
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_compiled_model_trains_by_steps(vgpus: VirtualGPUs) -> None:
    net = Doubled()
    model = wrapped(net, optimizer=torch.optim.SGD, loss_fn=square_loss)
    compiled: Any = torch.compile(model)
    first = compiled.train_step(*vector_batch(0))
    assert compiled.train_step(*vector_batch(0)) < first
