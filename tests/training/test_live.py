"""Forwards that take different paths: one trace for each, or live."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import harmony

from .conftest import VirtualGPUs
from .models import square_loss, vector_batch
from .plain import SGD, gradients_of, train_vectors

WIDTH = 24


class Block(nn.Module):
    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop, self.draws = nn.Dropout(0.1), draws

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(torch.tanh(self.up(x)))
        return x + self.drop(h) * (random.random() if self.draws else 1.0)


class Decides(nn.Module):
    """Takes a path by its inputs, by what it computes, by chance, or by counting."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(by == "python") for _ in range(5))
        self.shift = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("seen", torch.zeros(()))
        self.by, self.calls = by, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = bool(x[:, 0].sum() > 0) if self.by == "inputs" else False
        x = x * self.shift
        for block in self.blocks:
            if self.by == "torch" and torch.rand(()) < 0.4:
                continue
            if self.by == "python" and random.random() < 0.4:
                continue
            x = block(x)
            if self.by == "values" and x.mean() > 0:
                x = torch.tanh(x)
        if self.by == "inputs" and first:
            x = -x
        if self.by == "counting":
            self.calls += 1
            x = x / self.calls
        if self.by == "buffer":
            self.seen += 1
            if self.seen > 3:
                x = x * 2
        return x


def train(net: nn.Module, gpus: int = 2, **options: Any) -> tuple[Any, list[Any]]:
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs=SGD,
        loss_fn=square_loss,
        devices=gpus,
        microbatch_size=2,
        device_memory="64KiB",
        mode="pp",
        **options,
    )
    seen = []
    for step in range(3):
        loss = model.train_step(*vector_batch(step, width=WIDTH))
        seen.append((loss, gradients_of(net)))
    return model, seen


RUNGS = {
    "nothing": "trace",
    "inputs": "dynamic",  # two microbatches of one batch take different paths
    "torch": "dynamic",
    "python": "dynamic",
    "values": "dynamic",
    "counting": "dynamic",
    "buffer": "dynamic",
}


@pytest.mark.parametrize("by", RUNGS)
def test_every_microbatch_takes_its_own_path(by: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Decides(by)
    plain = copy.deepcopy(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, seen = train(net)
    for (loss, gradients), (wanted_loss, wanted) in zip(seen, train_vectors(plain), strict=True):
        assert torch.equal(loss, wanted_loss)
        for name, gradient in gradients.items():
            assert (gradient is None) == (wanted[name] is None), name
            assert gradient is None or torch.equal(gradient, wanted[name]), name
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert net.calls == plain.calls
    assert model.capture_mode == RUNGS[by] or by == "inputs"
    notices = [str(w.message) for w in caught if "recorded on its way" in str(w.message)]
    assert len(notices) == (by != "nothing")
    assert all("test_live.py" in notice or by == "counting" for notice in notices)


def test_each_outcome_of_the_inputs_has_its_trace(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Decides("inputs").eval()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, device_memory="64KiB", microbatch_size=4)
    inputs, _ = vector_batch(0, width=WIDTH)
    for sign in (1, -1, 1, -1):
        batch = inputs.clone()
        batch[:, 0] = sign
        with torch.no_grad():
            assert torch.equal(model(batch), plain(batch))
    assert model.capture_mode == "trace"
    assert len(list(model._engine.variants)) == 2


@pytest.mark.parametrize("by", ["values", "inputs", "counting"])
def test_the_drop_in_form_takes_the_path_of_the_whole_batch(by: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Decides(by)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, device_memory="128KiB", microbatch_size=8, mode="pp")
    for step in range(3):
        inputs, targets = vector_batch(step, width=WIDTH)
        losses = []
        for one in (model, plain):
            one.zero_grad()
            losses.append(square_loss(one(inputs), targets))
            losses[-1].backward()
        assert torch.equal(*losses)
        wanted = gradients_of(plain)
        for name, gradient in gradients_of(net).items():
            assert torch.equal(gradient, wanted[name]), name
    assert net.calls == plain.calls


def test_what_a_user_changes_between_steps_is_seen(vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = Decides("nothing")
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1, device_memory="128KiB", microbatch_size=8)
    inputs, _ = vector_batch(0, width=WIDTH)
    for rate in (0.0, 1.0, 0.0):
        for one in (net, plain):
            for module in one.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
        with torch.no_grad():
            assert torch.equal(model(inputs), plain(inputs))


@pytest.mark.parametrize("keeps", [False, True], ids=["dynamic", "eager"])
def test_a_loop_that_cannot_part_its_batches_says_so(vgpus: VirtualGPUs, keeps: bool) -> None:
    """A batch of a loop of one's own runs whole where no trace stands for it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.kept: list[torch.Tensor] = []
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if keeps:
                self.kept.append(x.sum())
            return self.norm(self.inner(x))

    torch.manual_seed(0)
    net = Net()
    twin = copy.deepcopy(net)
    x = torch.randn(8, 4)
    model = harmony.Harmony(net, devices=1, microbatch_size=4)
    with pytest.warns(harmony.HarmonyWarning, match=r"=4 does not part .*\(8 samples"):
        out = model(x)
    assert model.capture_mode == ("eager" if keeps else "dynamic")
    assert torch.equal(out, twin(x))
