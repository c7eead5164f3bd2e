"""Recurrent modules, which keep a list of their weights, and have cuDNN move them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import harmony
from tests import devices

from .changing import assert_same
from .conftest import VirtualGPUs
from .models import square_loss

WIDTH = 16


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.cells = getattr(nn, kind)(WIDTH, WIDTH, 2, batch_first=True)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cells(self.first(x))[0][:, -1])


def moved_as_cudnn_does(module: nn.RNNBase) -> None:
    """Give each weight on a device another memory, with its values."""
    on_device = [
        weight
        for weight in module._flat_weights
        if isinstance(weight, torch.Tensor)
        and not isinstance(weight, FakeTensor)
        and weight.device.type not in ("cpu", "meta")
    ]
    with torch.no_grad():
        for weight in on_device:
            weight.set_(weight.detach().clone())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_weights_stay_where_they_are_copied_to(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", moved_as_cudnn_does)
    torch.manual_seed(0)
    net: nn.Module = Recurrent(kind)
    plain = copy.deepcopy(net)
    options: dict[str, Any] = {"lr": 1e-2, "foreach": False}
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=options,
        loss_fn=square_loss,
        microbatch_size=4,
        devices=1,
    )
    theirs = torch.optim.AdamW(plain.parameters(), **options)
    live = []
    for step, length in enumerate((5, 5, 6, 7)):  # each length is recorded, and has slots
        x, y = torch.randn(4, length, WIDTH), torch.randn(4, WIDTH)
        theirs.zero_grad()
        expected = square_loss(plain(x), y)
        expected.backward()
        theirs.step()
        assert torch.equal(model.train_step(x, y), expected.detach())
        assert_same(net, plain, f"after step {step}")
        live.append(devices.live_nbytes())
    assert max(live) < 1.2 * min(live), "weights of an earlier length are let go"
