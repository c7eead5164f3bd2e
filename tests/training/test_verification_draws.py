"""Harmony.verify of models that draw: the whole batch draws what its microbatches drew."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs
from tests.training.models import GPT, token_batch, token_loss


class Noisy(nn.Module):
    """Draws a time and noise for each sample, as diffusion models do, and drops units."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 32), nn.Dropout(0.2), nn.GELU(), nn.Linear(32, 16)
        )
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = 1 if self.shared else len(x)
        time = torch.randint(0, 10, (rows, 1), device=x.device)
        out: torch.Tensor = self.layers(x + torch.randn_like(x) * time / 10)
        return out


class Skipping(nn.Module):
    """Skips layers at random."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if random.random() < 0.5:
                x = x + torch.tanh(layer(x))
        return x


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 16, generator=generator)


def wrapped(net: nn.Module, loss_fn: Any, **options: Any) -> harmony.Harmony:
    return harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=loss_fn, **options)


TWO: dict[str, Any] = {"mode": "dp", "devices": 2}
"""Two replicas: Harmony itself has chosen two microbatches."""


@pytest.mark.parametrize(
    ("net", "loss_fn", "batch"),
    [
        pytest.param(lambda: GPT(dropout=0.1), token_loss, lambda: token_batch(0), id="dropout"),
        pytest.param(Noisy, F.mse_loss, vectors, id="noise"),
    ],
)
def test_the_whole_batch_draws_what_the_microbatches_drew(
    vgpus: VirtualGPUs, net: Any, loss_fn: Any, batch: Any
) -> None:
    torch.manual_seed(0)
    found = wrapped(net(), loss_fn, **TWO).verify(*batch())
    assert found.ok, found.summary()
    assert found.num_microbatches == 2
    assert "the whole batch, with the microbatches' random numbers" in found.reference
    assert not found.notes


def test_draws_that_microbatches_share_are_said_not_to_be_compared_with_the_whole_batch(
    vgpus: VirtualGPUs,
) -> None:
    torch.manual_seed(0)
    found = wrapped(Noisy(shared=True), F.mse_loss, microbatch_size=4).verify(*vectors())
    assert found.ok, found.summary()
    assert "the same microbatches" in found.reference
    assert "cannot be drawn at once (randint draws (1, 1) for a microbatch" in found.summary()


@pytest.mark.filterwarnings("ignore:.*so no recorded forward")
@pytest.mark.parametrize("size", [8, 2])
def test_layers_skipped_at_random_are_verified_live(vgpus: VirtualGPUs, size: int) -> None:
    torch.manual_seed(0)
    model = wrapped(Skipping(), F.mse_loss, microbatch_size=size)
    found = model.verify(*vectors())
    assert found.ok, found.summary()
    assert found.num_microbatches == 8 // size
    assert ("Python or NumPy draws them" in found.summary()) is (size == 2)
