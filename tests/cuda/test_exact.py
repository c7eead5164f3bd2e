"""Harmony on the CUDA path computes what plain PyTorch computes there, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.cuda.plain import Batch, Loss, amp, assert_same, train_plain
from tests.devices import on_real_gpus
from tests.training.models import GPT, token_batch, token_loss

pytestmark = on_real_gpus

ADAMW = {"lr": 1e-3, "fused": True}


class BatchNormNet(nn.Module):
    """Convolutions with BatchNorm and a residual, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def images(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 12, 12, generator=generator)
    return x, torch.randint(0, 10, (8,), generator=generator)


def check_step(
    net: nn.Module, batches: list[Batch], loss_fn: Loss, *, autocast: bool = False, **options: Any
) -> harmony.Harmony:
    """Train both ways with AdamW and compare."""
    expected = train_plain(
        net,
        batches,
        loss_fn,
        optimizer=torch.optim.AdamW,
        options=ADAMW,
        microbatch=2,
        autocast=autocast,
        updates=options.setdefault("updates", "host"),
    )
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=ADAMW,
        loss_fn=loss_fn,
        microbatch_size=2,
        **{"mode": "pp", **options},
    )
    losses = []
    for x, y in batches:
        with amp() if autocast else contextlib.nullcontext():
            losses.append(float(model.train_step(x, y)))
    assert_same(losses, net, expected)
    return model


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpt_trains_as_plain_pytorch_on_some_gpus(devices: int, dropout: float) -> None:
    torch.manual_seed(0)
    net = GPT(width=64, depth=6, dropout=dropout)
    batches = [token_batch(step) for step in range(4)]
    model = check_step(net, batches, token_loss, devices=devices, device_memory="2MiB")
    assert model.plan is not None and len(model.plan.spec.backward_packs) > 1
    assert model.plan.schedule.num_devices == devices


@pytest.mark.parametrize("activations", ["recompute", "auto"])
def test_dropout_is_replayed_where_activations_are_made_again(activations: str) -> None:
    torch.manual_seed(0)
    net = GPT(width=64, depth=4, dropout=0.2)
    batches = [token_batch(step) for step in range(3)]
    check_step(net, batches, token_loss, devices=1, device_memory="2MiB", activations=activations)


def test_batch_norm_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    batches = [images(step) for step in range(3)]
    check_step(BatchNormNet(), batches, F.cross_entropy, devices=2, device_memory="4MiB")


def test_updates_on_the_gpu_are_plain_pytorch_s() -> None:
    torch.manual_seed(0)
    net = GPT(width=32, depth=3)
    batches = [token_batch(step) for step in range(3)]
    check_step(net, batches, token_loss, devices=1, device_memory="64MiB", updates="auto")


@pytest.mark.parametrize("devices", [1, 2])
def test_the_drop_in_form_trains_as_plain_pytorch(devices: int) -> None:
    torch.manual_seed(0)
    net = GPT(width=64, depth=4, dropout=0.0)
    batches = [token_batch(step) for step in range(3)]
    expected = train_plain(
        net,
        batches,
        token_loss,
        optimizer=torch.optim.SGD,
        options={"lr": 0.1},
        microbatch=8,
    )
    model = harmony.Harmony(
        net, devices=devices, device_memory="4MiB", microbatch_size=8, mode="pp"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = token_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == pytest.approx(expected[0], rel=1e-6)  # the loss itself is made on the host
    for name, value in expected[1].items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-7)


class EndsIn(nn.Module):
    """A layer whose last operator CUDA's autocast runs in float32, and CPU's in bfloat16."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 48)
        self.norm = nn.LayerNorm(48)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x * 1.7)  # the product sees all bits of what the layer before has made
        if self.kind == "layer norm":
            return self.norm(h)
        if self.kind == "softmax":
            return torch.softmax(h, -1)
        if self.kind == "root mean square":
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.cumsum(h, -1)


@pytest.mark.parametrize("kind", ["layer norm", "softmax", "root mean square", "cumsum"])
def test_values_between_layers_have_the_types_that_autocast_on_the_gpu_makes(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(EndsIn(kind) for _ in range(6)), nn.Linear(48, 8))
    batches = [
        (torch.randn(8, 48, generator=torch.Generator().manual_seed(step)), torch.zeros(8).long())
        for step in range(3)
    ]
    model = check_step(
        net, batches, F.cross_entropy, devices=4, device_memory="64KiB", autocast=True
    )
    assert model.plan is not None and len(model.plan.spec.backward_packs) > 1


def test_a_gpt_trains_under_autocast_as_plain_pytorch() -> None:
    torch.manual_seed(0)
    net = GPT(width=64, depth=4, dropout=0.1)
    batches = [token_batch(step) for step in range(3)]
    check_step(net, batches, token_loss, devices=2, device_memory="2MiB", autocast=True)


class Spreads(nn.Module):
    """Its output is one row, seen twice; a sum of two is the same in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(16, 16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh((x[:, :1] + x[:, 1:]) * self.scale[:1]).expand(-1, 2, -1)


def test_values_that_are_not_dense_go_from_gpu_to_gpu_in_order() -> None:
    """CUDA's copy between GPUs spread them on a stream that nothing waited for."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Spreads() for _ in range(6)), nn.Flatten(), nn.Linear(32, 4))
    seeds = [torch.Generator().manual_seed(step) for step in range(2)]
    batches = [(torch.randn(4, 2, 16, generator=g), torch.ones(4).long()) for g in seeds]
    model = check_step(net, batches, F.cross_entropy, devices=2, device_memory="12KiB")
    assert model.plan is not None and "Send X" in str(model.plan.schedule)
