"""The project's own tests on the GPUs: against plain PyTorch on the first of them, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpu_check.steps import Note

ROOT = Path(__file__).resolve().parents[2]
FIRST: tuple[str, ...] = (
    "tests/training/test_cuda.py",
    "tests/training/test_exact.py",
    "tests/cuda",
)
"""What says most, for when time runs out."""


def run(rest: bool, note: Note, small: bool) -> bool:
    """Note for each file how many tests passed, and which did not.

    Args:
        rest: all of tests/training, of each test the first case.
    """
    if importlib.util.find_spec("pytest") is None:
        note(skipped="pytest is not installed (scripts/gpu-check --fetch)")
        return True
    words = ["--device", "cuda", "--first-cases"] if rest or small else ["--device", "cuda"]
    named = FIRST[:2] if small else FIRST
    if rest:
        named = ("tests/training/test_rounds.py",) if small else ("tests/training",)
    return run_tests(note, [*words, *named])


def run_tests(note: Note, words: Sequence[str]) -> bool:
    """Run pytest with these words of its command line; note each file when it is done."""
    ours, theirs = os.pipe()
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "HARMONY_REPORTS": str(theirs)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_check.reports", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs])
    os.close(theirs)
    total: Counter[str] = Counter()
    of_file: Counter[str] = Counter()
    file = ""
    with os.fdopen(ours, encoding="utf-8") as reports:
        for line in reports:
            report = json.loads(line)
            before, file = file, report["test"].partition("::")[0]
            if before not in ("", file):
                note(what=before, **of_file)
                of_file.clear()
            of_file[report["outcome"]] += 1
            total[report["outcome"]] += 1
            if report["outcome"] == "failed":
                note(what="failed", test=report["test"], why=report["why"])
    if file:
        note(what=file, **of_file)
    note(
        what="tests",
        passed=total["passed"],
        failed=total["failed"],
        skipped_tests=total["skipped"],
    )
    return process.wait() == 0 and total["passed"] > 0
