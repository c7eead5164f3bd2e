"""Buffers and Python attributes that the forward changes; random numbers that Python draws."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harmony
from harmony.errors import ConfigError
from tests import devices

from .conftest import VirtualGPUs
from .models import square_loss, vector_batch
from .plain import SGD, gradients_of, train_vectors
from .side_by_side import assert_same_training

WIDTH = 24


class Norms(nn.Module):
    """Batch norm, with a momentum and as a cumulative mean, behind linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1 = nn.BatchNorm1d(WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.BatchNorm1d(WIDTH, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.norm1(self.first(x)))
        return self.last(torch.tanh(self.norm2(self.mid(h))))


class Average(nn.Module):
    """Adds a running mean of what it sees, which it changes in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how, self.calls = nn.Linear(WIDTH, WIDTH), how, 0
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.linear(x))
        now = h.detach().mean(0)
        if self.how == "replaced":
            self.mean = self.mean * 0.9 + now * 0.1
        elif self.how == "in place":
            self.mean.mul_(0.9).add_(now, alpha=0.1)
            self.count += 1
        elif self.how == "counted":
            self.calls += 1
            h = h / self.calls
        return h + self.mean


class Blocks(nn.Module):
    """Averages inside of layers; in the glue too if asked for."""

    def __init__(self, how: str, glue: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Average(how) for _ in range(4))
        self.glue = glue
        self.register_buffer("level", torch.ones(WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        if self.glue == "in place":
            self.level.lerp_(x.detach().abs().mean(0), 0.5)
        elif self.glue == "replaced":
            self.level = 0.5 * self.level + 0.5 * x.detach().abs().mean(0)
        x = x / self.level
        for block in self.blocks[2:]:
            x = block(x)
        return self.out(x)


class Draws(nn.Module):
    """Draws from all generators of the host inside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DrawingBlock() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class DrawingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = random.random() + np.random.rand() + torch.rand(()).item()
        return self.drop(torch.tanh(self.linear(x)) * scale)


def train(net: nn.Module, gpus: int, steps: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.SGD,
        updates="host",
        optimizer_kwargs=SGD,
        devices=gpus,
        microbatch_size=2,
        **{"loss_fn": square_loss, **options},
    )
    seen = []
    for step in range(steps):
        loss = model.train_step(*vector_batch(step, width=WIDTH))
        seen.append((loss, gradients_of(net)))
    return model, seen


def check_same(net: nn.Module, plain: nn.Module, seen: Any, expected: Any) -> None:
    for (loss, gradients), (wanted_loss, wanted) in zip(seen, expected, strict=True):
        assert torch.equal(loss, wanted_loss)
        for name, gradient in gradients.items():
            other = wanted[name]
            assert (gradient is None) == (other is None), name
            assert gradient is None or torch.equal(gradient, other.cpu()), name
    tensors = plain.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, tensors[name].cpu()), name
    for (name, module), (_, other) in zip(net.named_modules(), plain.named_modules(), strict=True):
        assert getattr(module, "calls", 0) == getattr(other, "calls", 0), name


MODELS = {
    "norms": Norms,
    "in place": lambda: Blocks("in place"),
    "replaced": lambda: Blocks("replaced"),
    "counted": lambda: Blocks("counted"),
    "glue in place": lambda: Blocks("in place", "in place"),
    "glue replaced": lambda: Blocks("", "replaced"),
}


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_forward_changes_is_changed_once(
    name: str, gpus: int, vgpus: VirtualGPUs
) -> None:
    torch.manual_seed(0)
    net = MODELS[name]()
    plain = copy.deepcopy(net)
    model, seen = train(net, gpus, device_memory="24KiB")
    assert len(model.plan.spec.backward_packs) > 1
    check_same(net, plain, seen, train_vectors(plain))


@pytest.mark.parametrize("name", ["norms", "in place", "counted"])
def test_the_drop_in_form_changes_it_once(name: str, vgpus: VirtualGPUs) -> None:
    torch.manual_seed(0)
    net = MODELS[name]()
    plain = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=2, microbatch_size=8, device_memory="32KiB")
    for step in range(3):
        inputs, targets = vector_batch(step, width=WIDTH)
        losses = []
        for one in (model, plain):
            one.zero_grad()
            losses.append(square_loss(one(inputs), targets))
            losses[-1].backward()
        assert torch.equal(*losses)
    check_same(net, plain, [(losses[0], gradients_of(net))], [(losses[1], gradients_of(plain))])
    with torch.no_grad():
        assert torch.equal(model(inputs), plain(inputs))
    check_same(net, plain, [], [])
    net.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs), plain(inputs))
    check_same(net, plain, [], [])


def test_every_generator_of_the_host_follows_the_microbatch(vgpus: VirtualGPUs) -> None:
    vgpus(count=3, memory="256MiB")
    torch.manual_seed(0)
    net = Draws()
    plain = copy.deepcopy(net)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    before = random.random(), np.random.rand(), torch.rand(())
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    _, seen = train(net, 2, mode="pp", device_memory="24KiB")
    after = random.random(), np.random.rand(), torch.rand(())
    assert before == after, "training draws from the program's own random streams"
    # On the CPU one generator serves dropout and rand(); on a device they are two.
    expected = train_vectors(plain, device=devices.device(2))
    for (loss, gradients), (wanted_loss, wanted) in zip(seen, expected, strict=True):
        assert torch.equal(loss, wanted_loss)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, wanted[name].cpu()), name


def test_data_parallel_training_is_refused_for_buffers_that_change(vgpus: VirtualGPUs) -> None:
    with pytest.raises(ConfigError, match=r"norm1 changes its buffers.*mode='pp'"):
        train(Norms(), 2, mode="dp")


def test_a_failed_step_leaves_the_buffers_alone(vgpus: VirtualGPUs) -> None:
    fails: list[bool] = []

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if fails:
            raise ValueError("on purpose")
        return square_loss(output, targets)

    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    model, _ = train(net, 2, steps=1, loss_fn=loss)
    before = copy.deepcopy(net.state_dict())
    fails.append(True)
    # What the loss reads has changed: it is put together anew, and fails there as it would alone.
    with pytest.raises((harmony.ExecutionError, ValueError), match="on purpose"):
        model.train_step(*vector_batch(1, width=WIDTH))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class Clamps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-1, 1)
        return self.linear(x)


def test_a_parameter_that_the_forward_changes_is_changed_once(vgpus: VirtualGPUs) -> None:
    """It cannot be recomputed, so the model runs as it is."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), Clamps()) for _ in range(3)))
    plain = copy.deepcopy(net)
    model = harmony.Harmony(
        net, optimizer=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, loss_fn=square_loss
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(2):
        x, y = vector_batch(step, width=WIDTH)
        optimizer.zero_grad()
        loss = square_loss(plain(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(model.train_step(x, y), loss.detach())
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    assert model.capture_mode == "eager"


class Scaled(nn.Module):
    """Computes with a buffer, and changes it afterwards in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)
        self.register_buffer("scale", torch.full((16,), 2.0))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("variance", torch.ones(16))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if self.how == "statistics":  # PyTorch's kernel moves them without a new version
            given = F.batch_norm(hidden, self.mean, self.variance)
            hidden = self.second(given.tanh())
            return self.last(F.batch_norm(hidden, self.mean, self.variance, training=True))
        hidden = hidden * self.scale
        if self.how == "replaced":
            self.scale = self.scale * 0.9 + hidden.detach().abs().mean(0) * 0.1
        else:
            self.scale.data.mul_(0.9)
        return self.last((self.second(hidden) / self.scale).tanh())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("activations", ["auto", "recompute"])
@pytest.mark.parametrize("how", ["statistics", "replaced", "data"])
def test_what_is_saved_of_a_buffer_is_what_plain_pytorch_saves(
    how: str, activations: str, inside: bool, vgpus: VirtualGPUs
) -> None:
    """A buffer that is replaced keeps its values for the backward; one that is written to behind
    its version has the new ones there. Kept activations had the old ones, and a replacement
    failed in the backward."""
    torch.manual_seed(0)
    net: nn.Module = Scaled(how)
    net = nn.Sequential(net, nn.Identity()) if inside else net
    batches = [((torch.randn(8, 8),), torch.randint(0, 4, (8,))) for _ in range(3)]
    assert_same_training(net, batches, activations=activations, devices=1)


@pytest.mark.parametrize("trains", [1, 3])
def test_statistics_that_two_norms_share_are_what_each_found(
    trains: int, vgpus: VirtualGPUs
) -> None:
    """One in train mode moves them, one in eval mode computes with them: the recompute of the
    forward began with the moved ones."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
    )
    one, two = net[1], net[3]
    one.running_mean, one.running_var = two.running_mean, two.running_var
    net[4 - trains].eval()
    twin = copy.deepcopy(net)
    model = harmony.Harmony(net, devices=1)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (model, twin)]
    for _ in range(3):
        x, y = torch.randn(8, 8), torch.randint(0, 4, (8,))
        for run, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(run(x), y).backward()
            optimizer.step()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
