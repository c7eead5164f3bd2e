"""The example, end to end, as a user runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "pretrain_gpt.py")
SMALL = ["--width", "64", "--depth", "6", "--heads", "4", "--context", "32"]
HARMONY = [sys.executable, "-m", "harmony", EXAMPLE, "--virtual"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def losses(text: str) -> list[str]:
    return re.findall(r"^step +\d+ +loss (\S+)$", text, re.MULTILINE)


def test_prints_the_losses_of_plain_pytorch() -> None:
    options = [*SMALL, "--steps", "4"]
    expected = run([sys.executable, EXAMPLE, "--reference", *options])
    assert expected.returncode == 0, expected.stderr
    for gpus, mode in (("1", "pp"), ("2", "pp"), ("2", "dp")):
        where = ["--gpus", gpus, "--mode", mode, "--gpu-memory", "2MiB"]
        found = run([*HARMONY, *where, *options])
        assert found.returncode == 0, found.stderr
        assert losses(found.stdout) == losses(expected.stdout)
        assert len(losses(found.stdout)) == 4
        assert "Bottleneck:" in found.stdout


def test_plain_pytorch_runs_out_of_memory_on_the_same_gpu() -> None:
    where = ["--device", "vgpu:0", "--memory", "2MiB"]
    done = run([sys.executable, EXAMPLE, "--reference", *SMALL, "--steps", "1", *where])
    assert done.returncode != 0
    assert "OutOfMemoryError" in done.stderr


def test_a_layer_that_cannot_fit() -> None:
    done = run([*HARMONY, "--gpus", "2", "--gpu-memory", "256KiB", *SMALL, "--steps", "1"])
    assert done.returncode == 1
    assert "the limit is 256 KiB" in done.stderr
    assert "Traceback" not in done.stderr
    assert losses(done.stdout) == []


def test_ctrl_c_during_a_step() -> None:
    command = [*HARMONY, "--gpus", "2", "--gpu-memory", "2MiB", *SMALL, "--steps", "100000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        # A shell that starts the tests in the background has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step   3"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "interrupted at step" in err
    assert "Traceback" not in err
    assert "Bottleneck:" in out  # the report of what ran
