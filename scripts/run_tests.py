#!/usr/bin/env python3
"""Runs the files of tests, each in a process of its own, two at a time.

    scripts/run_tests.py [--jobs 2] [ARGUMENTS OF PYTEST]

What one file leaves on the virtual GPUs of its process must not keep the next from setting up its
own. The planner has no devices; its files share a process. The processes are forked from this one,
which has imported PyTorch and Harmony and done nothing else: 3 s less of processor time a file.
Large files come first, so that no processor waits for one at the end. Exits 1 if any test failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import pkgutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as `python -m pytest` has it


OPTIONS = ("--timeout=600", "-Wignore::pytest.PytestAssertRewriteWarning")  # of what is imported
TOGETHER = "tests/planner"
OFTEN = ("hypothesis", "numpy", "safetensors.torch", "transformers.models.gpt2.modeling_gpt2")
"""What many tests import. None of it starts a thread or takes a device."""
ROOMS = ("capture", "checkpoint", "engine", "planner", "profiling", "report", "runtime")


def main() -> int:
    """Run all files; return 1 if a test failed, 0 else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    args, of_pytest = parser.parse_known_args()
    os.chdir(ROOT)
    preload()
    waiting, running, failed = files(), {}, []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            name = waiting.pop(0)
            running[start(name, of_pytest)] = name
        child, status = os.wait()
        name = running.pop(child)
        if os.waitstatus_to_exitcode(status) not in (pytest.ExitCode.OK, NO_TEST):
            failed.append(name)
    print(f"failed: {', '.join(sorted(failed))}" if failed else "no file of tests has failed")
    return int(bool(failed))


NO_TEST = pytest.ExitCode.NO_TESTS_COLLECTED  # with -k, of most files


def preload() -> None:
    """Import what most tests need; a fork shares its memory."""
    for name in OFTEN:
        importlib.import_module(name)
    for room in ROOMS:
        package = importlib.import_module(f"harmony.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    assert not torch.cuda.is_initialized()
    gc.collect()
    gc.freeze()


def files() -> list[str]:
    """The planner's folder, and all other files of tests, the largest first."""
    found = [path for path in ROOT.glob("tests/**/test_*.py") if TOGETHER not in path.as_posix()]
    found.sort(key=lambda path: (-path.stat().st_size, path))
    return [TOGETHER, *(path.relative_to(ROOT).as_posix() for path in found)]


def start(name: str, of_pytest: list[str]) -> int:
    """Run a file in a process of its own; return the number of the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        sys.exit(pytest.main([*OPTIONS, *of_pytest, name]))
    return child


if __name__ == "__main__":
    sys.exit(main())
