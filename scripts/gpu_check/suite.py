"""The project's own tests that want a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from gpu_check.steps import Note

ROOT = Path(__file__).resolve().parents[2]


def run(note: Note, small: bool) -> bool:
    """Note how many passed, and the first lines of those that did not."""
    if importlib.util.find_spec("pytest") is None:
        note(skipped="pytest is not installed (scripts/gpu-check --fetch)")
        return True
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        words += [f"--junitxml={results}", "tests/training/test_cuda.py"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
        cases = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    failed = []
    for case in cases:
        problem = case.find("failure") if case.find("failure") is not None else case.find("error")
        if problem is not None:
            failed.append(f"{case.get('classname')}.{case.get('name')}: {problem.get('message')}")
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    note(what="tests", passed=passed, failed=failed, skipped_tests=skipped)
    return code == 0 and bool(passed)
