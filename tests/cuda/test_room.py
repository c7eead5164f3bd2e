"""What lies on a GPU from step to step is cut from one piece of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.runtime import native
from tests.devices import on_real_gpus
from tests.training.models import square_loss

pytestmark = on_real_gpus


def large_segments(gpu: int) -> list[dict[str, Any]]:
    every = torch.cuda.memory_snapshot()
    return [s for s in every if s["device"] == gpu and s["segment_type"] == "large"]


@pytest.mark.parametrize("updates", ["auto", "host"])
def test_what_stays_on_a_gpu_is_cut_from_one_segment(updates: str) -> None:
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(512, 640), nn.Linear(640, 512))))
    with harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3},
        loss_fn=square_loss,
        devices=1,
        updates=updates,
        device_memory="64MiB",
    ) as model:
        for _ in range(3):
            model.train_step(torch.randn(8, 512), torch.randn(8, 512))
        (segment,) = large_segments(0)
        assert segment["allocated_size"] >= 8 * 512 * 640 * 4
        assert segment["total_size"] <= 1.25 * segment["allocated_size"]


def test_none_is_taken_where_much_is_reserved_that_cannot_be_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    take = native.take_segment

    def noted(device: torch.device, nbytes: int) -> None:
        taken.append(nbytes)
        take(device, nbytes)

    monkeypatch.setattr(native, "take_segment", noted)
    for expected in (1, 0):
        torch.cuda.empty_cache()
        taken.clear()
        whole = torch.empty(0 if expected else 60 * 2**20, dtype=torch.uint8, device="cuda:0")
        del whole
        kept = torch.empty(0 if expected else 2 * 2**20, dtype=torch.uint8, device="cuda:0")
        with harmony.Harmony(
            nn.Sequential(nn.Linear(512, 640), nn.Linear(640, 512)),
            optimizer=torch.optim.SGD,
            loss_fn=square_loss,
            devices=1,
            updates="host",
        ) as model:
            model.train_step(torch.randn(8, 512), torch.randn(8, 512))
        assert len(taken) == expected
        del kept


class Masks(nn.Module):
    """Has a buffer of 64 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("mask", torch.ones(32, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.mask[:, 0]


def test_between_steps_nothing_lies_on_a_gpu_but_slots() -> None:
    """Buffers of the copy with which a forward had been recorded last stayed there."""
    before = torch.cuda.memory_allocated(0)
    with harmony.Harmony(
        nn.Sequential(Masks(), Masks(), Masks()),
        optimizer=torch.optim.SGD,
        loss_fn=square_loss,
        devices=1,
        updates="host",
    ) as model:
        model.train_step(torch.randn(8, 32), torch.randn(8, 32))
        assert model.plan is not None
        spec = model.plan.schedule.devices[0]
        slots = spec.weight_slots.total_nbytes + spec.gradient_slots.total_nbytes
        assert not spec.resident
        assert torch.cuda.memory_allocated(0) - before <= slots + 16 * 1024
