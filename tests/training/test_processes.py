"""One of several processes is refused: each would train a model of its own in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import harmony
from tests.training.conftest import VirtualGPUs

SCRIPT = """
import torch
import harmony

model = harmony.Harmony(torch.nn.Linear(4, 4))
model(torch.randn(2, 4)).sum().backward()
print("trained")
"""


def launched(tmp_path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(processes), str(script)]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=environment)


def test_torchrun_with_two_processes_ends_with_one_clear_error(tmp_path: Path) -> None:
    done = launched(tmp_path, 2)
    assert done.returncode != 0 and "trained" not in done.stdout
    assert "of 2 (RANK=" in done.stderr and "Start the script once" in done.stderr


def test_torchrun_with_one_process_trains(tmp_path: Path) -> None:
    done = launched(tmp_path, 1)
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout


def test_a_group_that_is_made_later_is_seen_before_the_next_step(
    vgpus: VirtualGPUs, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 4)
    model = harmony.Harmony(
        net, optimizer=torch.optim.SGD, loss_fn=nn.functional.mse_loss, devices=1
    )
    inputs = torch.randn(2, 4)
    model.train_step(inputs, inputs)
    before = net.weight.detach().clone()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(harmony.ConfigError, match=r"process 1 of 4 \(torch\.distributed\)"):
        model.train_step(inputs, inputs)
    with pytest.raises(harmony.ConfigError, match="devices= says which GPUs"):
        model(inputs).sum().backward()
    with pytest.raises(harmony.ConfigError, match="Start the script once"):
        harmony.Harmony(nn.Linear(4, 4))
    assert torch.equal(net.weight, before)
    with torch.no_grad():
        model(inputs)
