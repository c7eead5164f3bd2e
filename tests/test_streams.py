"""`harmony-run` with standard streams that are closed, full, or without a reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import sys, torch, harmony
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
model = harmony.Harmony(net, optimizer=torch.optim.SGD, loss_fn=torch.nn.functional.mse_loss)
print("begins")
for step in range(2):
    model.train_step(torch.ones(4, 8), torch.zeros(4, 8))
print("ends", file=sys.stderr)
"""


def run(words: str, folder: Path) -> tuple[int, str, str]:
    """Run ``harmony-run`` by a shell, which closes or redirects its streams."""
    command = f"{sys.executable} -m harmony {words}"
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env=None,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("plan --list-gpus >&-", 1),
        ("plan --list-gpus > /dev/full", 1),
        ("plan --list-gpus 2>&-", 0),
        ("plan --list-gpus 2> /dev/full", 0),
        ("plan --nonsense 2>&-", 2),
        ("plan --nonsense 2> /dev/full", 2),
        ("missing.py >&- 2>&-", 2),
    ],
)
def test_what_is_lost_shows_in_the_exit_code(tmp_path: Path, words: str, code: int) -> None:
    found, _, errors = run(words, tmp_path)
    assert found == code
    assert "Traceback" not in errors and "Exception ignored" not in errors
    if code == 1:
        assert errors.startswith("harmony: error: cannot write the plan")


@pytest.mark.parametrize(
    ("streams", "code"), [(">&- 2>&-", 1), ("2> /dev/full", 0), ("> /dev/null", 0)]
)
def test_a_run_whose_streams_are_lost_still_trains_and_writes_its_report(
    tmp_path: Path, streams: str, code: int
) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    if streams == "2> /dev/full":  # the script's own line would fail, as in plain Python
        (tmp_path / "train.py").write_text(TRAIN.rpartition("print")[0])
    found, _, errors = run(f"train.py --report report.json {streams}", tmp_path)
    assert found == code, errors
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["name"] == "Sequential"
