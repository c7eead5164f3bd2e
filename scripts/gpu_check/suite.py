"""The project's own tests on the GPUs: against plain PyTorch on the first of them, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check.steps import Note

ROOT = Path(__file__).resolve().parents[2]
Found = Mapping[str, Any]
FIRST = ("tests/training/test_cuda.py", "tests/training/test_exact.py")
"""What says most of the tests of training, for when time runs out."""

_NO_TESTS = 5
"""pytest's exit code where a file has no test that is to run, as one that draws all its cases."""

_ENDED = (0, 1, _NO_TESTS)
"""Its exit codes where the last file is done."""


def run(note: Note, small: bool, before: Sequence[Found]) -> bool:
    """Note for each file of `FIRST`, and of tests/cuda, how many tests passed, and which did not.

    Args:
        before: what was noted when the step was interrupted, or failed: files that had passed are
            not run again.
    """
    every = [*FIRST, *_tests_in("cuda")]
    return _go_on(FIRST if small else every, ["--first-cases"] if small else [], note, before)


def run_part(part: int, num_parts: int, note: Note, small: bool, before: Sequence[Found]) -> bool:
    """Note the same of a part of the other files of tests/training, of a test the first case."""
    files = parts(num_parts)[part]
    if small:  # the smallest that has a first case
        files = [f for f in files if "@given" not in (ROOT / f).read_text(encoding="utf-8")][-1:]
    return _go_on(files, ["--first-cases"], note, before)


def _go_on(
    files: Sequence[str], words: Sequence[str], note: Note, before: Sequence[Found]
) -> bool:
    if importlib.util.find_spec("pytest") is None:
        note(skipped="pytest is not installed (scripts/gpu-check --fetch)")
        return True
    passed = {found["what"]: found for found in before if not found.get("failed")}
    total: Counter[str] = Counter()
    for file in filter(passed.__contains__, files):
        note(**passed[file])
        total.update(passed=passed[file].get("passed", 0))
        total.update(skipped=passed[file].get("skipped_tests", 0))
    rest = [file for file in files if file not in passed]
    if not rest:
        return _note_total(note, total)
    return run_tests(note, ["--device", "cuda", *words, *rest], total)


def _tests_in(folder: str) -> list[str]:
    paths = sorted((ROOT / "tests" / folder).glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths]


def parts(num_parts: int) -> list[list[str]]:
    """Share the files of tests/training out, but `FIRST`, so that parts have as many tests."""
    sizes = {
        file: (ROOT / file).read_text(encoding="utf-8").count("\ndef test_")
        for file in _tests_in("training")
    }
    shared: list[list[str]] = [[] for _ in range(num_parts)]
    totals = [0] * num_parts
    for file in sorted(sizes.keys() - set(FIRST), key=lambda file: (-sizes[file], file)):
        least = totals.index(min(totals))
        shared[least].append(file)
        totals[least] += sizes[file]
    return shared


def run_tests(note: Note, words: Sequence[str], total: Counter[str] | None = None) -> bool:
    """Run pytest with these words of its command line; note each file when it is done.

    Args:
        total: outcomes of tests that were run before, to be added to.
    """
    ours, theirs = os.pipe()
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "HARMONY_REPORTS": str(theirs)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_check.reports", *words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs])
    os.close(theirs)
    total = Counter() if total is None else total
    of_file: Counter[str] = Counter()
    file = ""
    with os.fdopen(ours, encoding="utf-8") as reports:
        for line in reports:
            report = json.loads(line)
            before, file = file, report["test"].partition("::")[0]
            if before not in ("", file):
                _note_file(note, before, of_file)
                of_file.clear()
            of_file[report["outcome"]] += 1
            total[report["outcome"]] += 1
            if report["outcome"] == "failed":
                note(what="failed", test=report["test"], why=report["why"])
    code = process.wait()
    if file and code in _ENDED:
        _note_file(note, file, of_file)
    return _note_total(note, total) and code in (0, _NO_TESTS)


def _note_file(note: Note, file: str, outcomes: Counter[str]) -> None:
    """Note a file; `skipped` would say that the whole step is."""
    named = {"skipped": "skipped_tests"}
    note(what=file, **{named.get(outcome, outcome): n for outcome, n in outcomes.items()})


def _note_total(note: Note, total: Counter[str]) -> bool:
    """Note how many tests there were; returns whether there were any."""
    note(
        what="tests",
        passed=total["passed"],
        failed=total["failed"],
        skipped_tests=total["skipped"],
    )
    return total.total() > 0
