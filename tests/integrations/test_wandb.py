"""Weights & Biases gets what a model does, by a run's own interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harmony
import harmony.integrations
from tests.integrations.common import classifier
from tests.training.conftest import VirtualGPUs

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 4


class Run:
    """What a run of wandb is asked for; a row that is older than its step would be dropped."""

    def __init__(self) -> None:
        self.step = 0
        self.metrics: dict[str, str | None] = {}
        self.logged: list[dict[str, Any]] = []
        self.told: dict[str, Any] = {}
        self.config = self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is None or step >= self.step, "dropped"
        self.step = self.step + 1 if step is None else step
        self.logged.append(data)

    def update(self, data: dict[str, Any], *, allow_val_change: bool) -> None:
        assert allow_val_change, "plans change"
        self.told.update(data)


def trained(
    observer: harmony.Observer | None, script: Callable[[int], None] = lambda step: None
) -> list[float]:
    model = harmony.Harmony(
        classifier(), optimizer=torch.optim.SGD, loss_fn=nn.functional.cross_entropy, devices=1
    )
    if observer is not None:
        model.add_observer(observer)
    losses = []
    for step in range(4):
        losses.append(model.train_step(INPUTS, TARGETS).item())
        script(step)
    return losses


def test_every_second_step_is_logged_and_training_is_the_same(vgpus: VirtualGPUs) -> None:
    run = Run()
    losses = trained(harmony.integrations.WandbObserver(run, every=2))
    assert losses == trained(None)
    assert run.metrics == {"harmony/step": None, "harmony/*": "harmony/step"}
    assert [row["harmony/step"] for row in run.logged] == [0, 2]
    assert [row["harmony/loss"] for row in run.logged] == losses[::2]
    names = {"step", "loss", "step_s", "samples_per_s", "gpu0_peak_GiB"}
    assert {name.removeprefix("harmony/") for name in run.logged[0]} == names
    assert "harmony/plan" in run.told and "expected" in run.told["harmony/expected"]


@pytest.mark.parametrize("numbered", [True, False])
def test_what_the_script_logs_is_not_dropped(vgpus: VirtualGPUs, numbered: bool) -> None:
    run = Run()

    def script(step: int) -> None:
        run.log({"mine": step}, step=step if numbered else None)
        run.log({"other": step}, step=step if numbered else None)

    trained(harmony.integrations.WandbObserver(run), script)
    assert [row["mine"] for row in run.logged if "mine" in row] == [0, 1, 2, 3]
    assert [row["harmony/step"] for row in run.logged if "harmony/step" in row] == [0, 1, 2, 3]


def test_without_wandb_or_a_run_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(harmony.ConfigError, match=r"pip install 'harmony-train\[wandb\]'"):
        harmony.integrations.WandbObserver()


def test_a_real_run_keeps_them(
    vgpus: VirtualGPUs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(harmony.ConfigError, match=r"wandb\.init"):
        harmony.integrations.WandbObserver()
    run = wandb.init(project="test", mode="offline", dir=str(tmp_path))
    losses = trained(harmony.integrations.WandbObserver())
    assert "expected" in run.config["harmony/expected"]
    run.log({"mine": 1})  # closes the last row
    assert run.summary["harmony/loss"] == pytest.approx(losses[-1])
    assert run.summary["harmony/step"] == 3
    run.finish()
