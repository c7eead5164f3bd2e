"""The check of a machine with GPUs, where there is none; tests/cuda has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_check.page import as_text
from gpu_check.steps import STEPS
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
    assert (one["passed"], one["failed"], one["skipped"]) == (1, 1, 1)
    assert two["what"].endswith("test_two.py") and two["passed"] == 1
    assert (total["passed"], total["failed"], total["skipped_tests"]) == (2, 1, 1)
