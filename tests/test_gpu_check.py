"""The check of a machine with GPUs, where there is none; tests/cuda has the rest."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_check import main, suite
from gpu_check.page import as_text
from gpu_check.steps import STEPS, TRAINING_PARTS
from gpu_check.suite import run_tests

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_makes_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "scripts" / "gpu-check"), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "finds no CUDA GPU" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_page_has_every_figure_and_the_end_of_what_failed() -> None:
    figure = {
        "what": "GPU 0",
        "h2d": 12.3456,
        "names": ["a", "b"],
        **{f"n{i}": i for i in range(30)},
    }
    ok = {"state": "ok", "seconds": 1.5, "figures": [figure], "error": None}
    failed = {"state": "FAILED", "seconds": 2.0, "figures": [], "error": "line 1\nValueError: x"}
    steps = {"links": ok, "exact": failed}
    text = as_text({"commit": "0123456789abcdef", "small": False, "steps": steps})
    assert "GPU 0: h2d 12.35, names a; b, n0 0," in text and "n29 29" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "exact: FAILED, 2 s" in text and "| ValueError: x" in text


def test_steps_have_names_of_their_own() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_each_test_that_fails_is_noted_and_each_file_when_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "def test_holds(): pass\n"
        "def test_does_not(): assert 1 + 1 == 3, 'a sum'\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_left_out(): pass\n",
        encoding="utf-8",
    )
    (tmp_path / "test_two.py").write_text("def test_holds(): pass\n", encoding="utf-8")
    noted: list[dict[str, Any]] = []
    assert not run_tests(lambda **figures: noted.append(figures), [str(tmp_path)])
    failed, one, two, total = noted
    assert failed["test"].endswith("test_one.py::test_does_not") and "a sum" in failed["why"]
    assert one["what"].endswith("test_one.py")
    assert (one["passed"], one["failed"], one["skipped_tests"]) == (1, 1, 1)
    assert not any("skipped" in figures for figures in noted)  # or the step would count as skipped
    assert two["what"].endswith("test_two.py") and two["passed"] == 1
    assert (total["passed"], total["failed"], total["skipped_tests"]) == (2, 1, 1)


def test_each_file_of_training_is_in_one_part_and_parts_are_alike() -> None:
    shared = suite.parts(TRAINING_PARTS)
    every = [path.name for path in (ROOT / "tests" / "training").glob("test_*.py")]
    first = [Path(name).name for name in suite.FIRST if name.endswith(".py")]
    found = [Path(file).name for part in shared for file in part]
    assert sorted(found + first) == sorted(every)
    counts = [
        sum((ROOT / file).read_text(encoding="utf-8").count("\ndef test_") for file in part)
        for part in shared
    ]
    assert max(counts) - min(counts) <= 5, counts


def test_a_part_that_was_interrupted_goes_on_with_what_had_not_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, *rest = suite.parts(TRAINING_PARTS)[0]
    before = [
        {"what": "failed", "test": f"{second}::test_x", "why": "a sum"},
        {"what": first, "passed": 3, "skipped_tests": 1},
        {"what": second, "passed": 2, "failed": 1},
        {"what": "tests", "passed": 5, "failed": 1, "skipped_tests": 1},
    ]
    asked: list[list[str]] = []

    def ran(note: Any, words: Any, total: Any) -> bool:
        asked.append(list(words))
        assert dict(total) == {"passed": 3, "skipped": 1}
        return True

    monkeypatch.setattr(suite, "run_tests", ran)
    noted: list[dict[str, Any]] = []
    given = (0, TRAINING_PARTS, lambda **figures: noted.append(figures), False)
    assert suite.run_part(*given, before)
    assert noted == [before[1]] and asked[0][-len(rest) - 1 :] == [second, *rest]

    noted.clear()
    passed = [{"what": file, "passed": 1} for file in (first, second, *rest)]
    assert suite.run_part(*given, passed) and len(asked) == 1
    total = {"what": "tests", "passed": 2 + len(rest), "failed": 0, "skipped_tests": 0}
    assert noted[-1] == total


def test_what_an_interrupted_step_had_noted_stays_for_it_to_go_on_and_not_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main.subprocess, "Popen", _Ended)
    goes_on = next(step for step in STEPS if step.goes_on)
    another = next(step for step in STEPS if not step.goes_on)
    for resume in (True, False):
        for step in (goes_on, another):
            main.figures_of(tmp_path, step).write_text('{"what": "x"}\n{"what": "y', "utf-8")
            given = SimpleNamespace(out=tmp_path, small=True, resume=resume)
            found = main.run_step(step, given)["figures"]
            assert found == ([{"what": "x"}] if resume and step is goes_on else [])


def test_a_step_ends_when_the_check_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []

    class Told(_Ended):
        def wait(self, seconds: float | None = None) -> int:
            signal.raise_signal(signal.SIGTERM)
            return 0

    monkeypatch.setattr(main.subprocess, "Popen", Told)
    monkeypatch.setattr(main, "_end", ended.append)
    monkeypatch.setattr(main, "commit", lambda: "0")
    given = {"resume": False, "small": True, "steps": ["links"], "out": tmp_path}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit):
            main.run_all(argparse.Namespace(**given))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(ended) == 1


class _Ended:
    """A process that has ended."""

    pid = 2**30

    def __init__(self, *words: Any, **how: Any) -> None:
        pass

    def wait(self, seconds: float | None = None) -> int:
        return 0
