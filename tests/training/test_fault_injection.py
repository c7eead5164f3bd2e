"""A sample of scripts/inject_faults.py, which has the other places and faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import devices

ROOT = Path(__file__).parents[2]


@devices.virtual_only("its processes set them up")
@pytest.mark.timeout(400)
def test_after_injected_faults_the_state_is_of_one_step_or_refused() -> None:
    """In a process of its own: a fault that hangs or aborts it is found there as well."""
    words = [sys.executable, str(ROOT / "scripts" / "inject_faults.py"), "--faults", "20"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words += ["--forms", "step", "dropin", "--seed", "1"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 faults" in done.stdout
