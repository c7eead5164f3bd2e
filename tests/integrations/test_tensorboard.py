"""TensorBoard shows what a model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import harmony
import harmony.integrations
from tests.integrations.common import classifier
from tests.training.conftest import VirtualGPUs

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def test_every_step_is_written_and_training_is_the_same(
    vgpus: VirtualGPUs, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8) % 4
    losses = []
    for observed in (False, True):
        model = harmony.Harmony(
            classifier(), optimizer=torch.optim.SGD, loss_fn=nn.functional.cross_entropy, devices=1
        )
        if observed:
            observer = harmony.integrations.TensorBoardObserver(tmp_path, every=2)
            model.add_observer(observer)
        losses.append([model.train_step(inputs, targets).item() for _ in range(4)])
    assert losses[0] == losses[1]
    observer.writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    written = [(event.step, event.value) for event in found.Scalars("harmony/loss")]
    assert written == [(0, pytest.approx(losses[1][0])), (2, pytest.approx(losses[1][2]))]
    names = {tag.removeprefix("harmony/") for tag in found.Tags()["scalars"]}
    assert names == {"loss", "step_s", "samples_per_s", "gpu0_peak_GiB"}
    assert "harmony/plan/text_summary" in found.Tags()["tensors"]
