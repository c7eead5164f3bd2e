"""Warnings name the line of the program that led to them, and have a category of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
from harmony.errors import HarmonyWarning
from tests import devices
from tests.training.conftest import VirtualGPUs


class Notes(nn.Module):
    """Keeps what it has computed, so that no recording stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.kept: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(self.inner(x).sum().detach())
        return self.inner(x)


def places(caught: list[warnings.WarningMessage]) -> set[str]:
    ours = [w for w in caught if issubclass(w.category, HarmonyWarning)]
    assert ours
    return {w.filename for w in ours}


@pytest.mark.parametrize("form", ["step", "loop"])
def test_a_warning_of_a_step_names_the_line_of_the_loop(vgpus: VirtualGPUs, form: str) -> None:
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
    step = {"loss_fn": nn.functional.mse_loss, **options} if form == "step" else {}
    model = harmony.Harmony(Notes(), devices=1, **step)
    x = torch.randn(4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if form == "step":
            model.train_step(x, x)
        else:
            model(x).sum().backward()
    assert places(caught) == {__file__}


def test_a_warning_of_a_method_names_the_line_that_calls_it(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    model = harmony.Harmony(nn.Linear(4, 4), devices=1)
    model(torch.randn(2, 4)).sum().backward()
    model.save_checkpoint(tmp_path)
    (tmp_path / "step-00000009").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_checkpoint(tmp_path, skip_damaged=True)
        model.to(devices.device())
    assert places(caught) == {__file__}
    assert len(caught) == 2
