"""The check of a machine with GPUs, rehearsed on the stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.standin import ROOT


def gpu_check(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "gpu-check", "--small", *words]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=500
    )


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


def test_steps_are_noted_and_taken_up_again(tmp_path: Path) -> None:
    done = gpu_check("--out", tmp_path, "--steps", "machine", "links")
    assert done.returncode == 0, done.stdout
    found = results(tmp_path)
    assert [step["state"] for step in found["steps"].values()] == ["ok", "ok"]
    assert found["steps"]["links"]["figures"][1]["h2d"] > 0
    assert "GPU 0, GB/s: h2d" in (tmp_path / "page.txt").read_text(encoding="utf-8")

    again = gpu_check("--out", tmp_path, "--resume", "--steps", "machine", "sanitizer")
    assert "machine: the machine" not in again.stdout and "sanitizer: " in again.stdout
    assert results(tmp_path)["steps"]["machine"] == found["steps"]["machine"]


@pytest.mark.slow
def test_training_is_compared_with_plain_pytorch_on_the_same_gpu(tmp_path: Path) -> None:
    done = gpu_check("--out", tmp_path, "--steps", "exact")
    assert done.returncode == 0, done.stdout
    figures = results(tmp_path)["steps"]["exact"]["figures"]
    assert len(figures) == 7 and all(figure["bits"] == "equal" for figure in figures)


def test_a_step_that_fails_is_told_with_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "links.jsonl").mkdir()  # where the step writes what it finds
    done = gpu_check("--out", tmp_path, "--steps", "links")
    assert done.returncode == 1
    assert "IsADirectoryError" in done.stdout
