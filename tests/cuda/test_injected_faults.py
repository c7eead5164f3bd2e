"""A sample of scripts/inject_cuda_faults.py, which has the other calls and phases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cuda import standin


@pytest.mark.timeout(900)
def test_after_calls_of_cuda_that_fail_the_state_is_of_one_step_or_refused() -> None:
    """In processes of their own: a lost GPU, a hang or an abort ends one of them."""
    words = [sys.executable, "scripts/inject_cuda_faults.py", "--faults", "12", "--seed", "0"]
    env = os.environ | {"PYTHONPATH": str(standin.ROOT)}
    done = subprocess.run(
        words, env=env, cwd=standin.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 faults" in done.stdout
