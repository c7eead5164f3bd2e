"""A process that is killed leaves whole checkpoints, from which the run goes on bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import devices

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_and_resume.py"


@devices.virtual_only("its processes set them up")
@pytest.mark.slow
@pytest.mark.parametrize("how", [["KILL"], ["INT"], ["KILL", "--async-save"]], ids=" ".join)
def test_a_killed_run_goes_on(how: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--signal", *how]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    around = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, env=around, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("3 kills, 2 of them aimed at a save; 8 steps, 0 of which differ\n")
