"""One of several processes needs a group: else each would train a model of its own."""

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


TOGETHER = """
import os
import torch
import torch.distributed as dist
import harmony

try:
    harmony.Harmony(torch.nn.Linear(4, 4))
except harmony.ConfigError as error:
    print(error)
dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
net = torch.nn.Linear(4, 4)
options = {"optimizer": torch.optim.SGD, "loss_fn": torch.nn.functional.mse_loss}
model = harmony.Harmony(net, **options, process_group=dist.group.WORLD)
model.train_step(torch.randn(2, 4), torch.randn(2, 4))
with open(f"{__file__}.{os.environ['LOCAL_RANK']}", "w") as found:
    found.write(repr(net.weight.tolist()))
model.close()
"""


def launched(
    tmp_path: Path, processes: int, text: str = SCRIPT
) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(text)
    root = str(Path(__file__).parents[2])
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(processes), str(script)]
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(line, capture_output=True, text=True, timeout=200, env=environment)


def test_torchrun_with_two_processes_trains_one_model_if_they_are_told_to(tmp_path: Path) -> None:
    done = launched(tmp_path, 2, TOGETHER)
    assert done.returncode == 0, done.stderr
    assert "is process 1 of 2 (RANK=" in done.stdout and "start the script once" in done.stdout
    one, other = ((tmp_path / f"train.py.{rank}").read_text() for rank in range(2))
    assert one == other


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
    with pytest.raises(harmony.ConfigError, match="start the script once"):
        harmony.Harmony(nn.Linear(4, 4))
    assert torch.equal(net.weight, before)
    with torch.no_grad():
        model(inputs)
