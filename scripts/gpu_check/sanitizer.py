"""A few steps under NVIDIA's compute-sanitizer, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from gpu_check.steps import Note

_SCRIPT = """
import sys
sys.path[:0] = {paths!r}
import torch, harmony
from gpu_check.models import TINY, batches, loss_fn, make_model
model = harmony.Harmony(make_model(TINY), optimizer=torch.optim.AdamW, loss_fn=loss_fn,
                        device_memory="8MiB")
for x, y in batches(TINY, 3):
    model.train_step(x, y)
print("trained")
"""


def run(note: Note, small: bool) -> bool:
    """Note the errors that memcheck counts; False if there is one."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        note(skipped="compute-sanitizer is not installed")
        return True
    words = [found, "--tool", "memcheck", sys.executable, "-c", _SCRIPT.format(paths=sys.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    note(what="memcheck", said=summary, trained="trained" in done.stdout)
    return "trained" in done.stdout and any(" 0 errors" in line for line in summary)
