#!/usr/bin/env python3
"""Predicted against measured step time, on virtual GPUs of several speeds.

    scripts/check_prediction.py [--json] [--steps 6]

Each setting trains a small GPT in a process of its own, on virtual GPUs whose links are throttled
and whose operators take an injected time, so that several of them behave like GPUs of their own
although they share the cores: what is injected is much longer than what is computed, and takes no
core. Compares the plan's step time with the median of what was measured.
Exits 1 if any setting is off by more than the bar of 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import batches, loss_fn, make_model

import harmony

BAR_PERCENT = 15.0
WIDTH, DEPTH, HEADS, CONTEXT, BATCH, MICROBATCH = 128, 6, 4, 16, 8, 2


@dataclass(frozen=True)
class Setting:
    """A server: how many GPUs, how fast their links and operators are, and the mode."""

    gpus: int
    mode: str
    link: str
    delay_us: float
    memory: str = "5MiB"


SETTINGS = (
    Setting(1, "pp", "1GB/s", 1000.0),  # bound by compute
    Setting(1, "pp", "5MB/s", 200.0),  # bound by its link
    Setting(2, "pp", "20MB/s", 1000.0),
    Setting(4, "pp", "20MB/s", 1000.0),
    Setting(4, "pp", "5MB/s", 500.0),
    Setting(2, "dp", "20MB/s", 1000.0),
    Setting(4, "dp", "5MB/s", 500.0),
)


def main() -> int:
    """Run every setting, print a table, and return 1 if one misses the bar."""
    args = parse_arguments()
    if args.setting is not None:
        print(json.dumps(measure(Setting(**json.loads(args.setting)), args.steps)))
        return 0
    rows = []
    for setting in SETTINGS:
        command = [sys.executable, __file__, "--steps", str(args.steps)]
        words = [*command, "--setting", json.dumps(asdict(setting))]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        row = {**asdict(setting), **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        if not args.json:
            print(describe(row), flush=True)
    worst = max(abs(row["error_percent"]) for row in rows)
    passed = worst <= BAR_PERCENT
    if args.json:
        figures = {"worst_percent": worst, "bar_percent": BAR_PERCENT, "passed": passed}
        print(json.dumps({**figures, "settings": rows}, indent=2))
    else:
        verdict = "held" if passed else "MISSED"
        print(f"worst: {worst:.1f} %; the bar is {BAR_PERCENT:.0f} %: {verdict}")
    return 0 if passed else 1


def measure(setting: Setting, steps: int) -> dict[str, Any]:
    """Train in this process and return predicted and measured seconds of a step."""
    torch.set_num_threads(1)
    harmony.virtual_gpus(
        count=setting.gpus, memory=setting.memory, link=setting.link, delay_us=setting.delay_us
    )
    model = harmony.Harmony(
        make_model(WIDTH, DEPTH, HEADS, CONTEXT),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"fused": True},
        loss_fn=loss_fn,
        mode=setting.mode,
        microbatch_size=MICROBATCH,
    )
    measured = []
    for inputs, targets in batches(steps, BATCH, CONTEXT):
        model.train_step(inputs, targets)
        assert model.last_timeline is not None
        measured.append(model.last_timeline.step_s)
    assert model.plan is not None
    typical = statistics.median(measured[1:])
    return {
        "predicted_s": model.plan.step_s,
        "measured_s": typical,
        "error_percent": (typical / model.plan.step_s - 1) * 100,
        "bound": model.plan.bound,
    }


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"{row['gpus']} GPU  {row['mode']}  link {row['link']:>8}  {row['delay_us']:5.0f} us/op  "
        f"predicted {row['predicted_s'] * 1e3:7.1f} ms  measured {row['measured_s'] * 1e3:7.1f} ms"
        f"  {row['error_percent']:+5.1f} %"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
