#!/usr/bin/env python3
"""The example on one virtual GPU of 64 MiB: plain PyTorch runs out of memory, Harmony trains.

    scripts/vgpu_memory_demo.py

Runs examples/pretrain_gpt.py both ways, two steps each. Exits 1 if plain PyTorch does not run out
of memory, or if Harmony fails.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "examples" / "pretrain_gpt.py")
MEMORY = "64MiB"


def main() -> int:
    """Run both forms and say what became of them."""
    plain = run(SCRIPT, "--reference", "--device", "vgpu:0", "--memory", MEMORY, "--steps", "2")
    ran_out = plain.returncode != 0 and "OutOfMemoryError" in plain.stderr
    last = (plain.stderr.strip().splitlines() or ["it ran"])[-1]
    print(f"plain PyTorch, one virtual GPU of {MEMORY}: exit code {plain.returncode}\n  {last}")
    ours = run(
        "-m", "harmony", SCRIPT, "--virtual", "--gpus", "1", "--gpu-memory", MEMORY, "--steps", "2"
    )
    print(f"Harmony, the same GPU: exit code {ours.returncode}")
    print("\n".join(f"  {line}" for line in ours.stdout.splitlines()))
    if ours.returncode:
        print(ours.stderr, file=sys.stderr)
    return 0 if ran_out and ours.returncode == 0 else 1


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run python with ``words`` in the project's folder."""
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )


if __name__ == "__main__":
    sys.exit(main())
