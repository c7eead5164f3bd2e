#!/usr/bin/env python3
"""Uses a model in random ways and compares it with plain PyTorch after every operation.

    scripts/random_usage.py [--number 200] [--seed 0] [--all] [--only OPERATION ...]

A usage is a sequence of training steps, loops of one's own, evaluation, saving and loading,
freezing, hooks, changes of buffers, parameters, attributes, learning rates, lengths and batch
sizes, and interruptions (see `tests/training/random_usage.py`). Prints every usage that differs or
ends in an error, in its shortest form, and how many there were; exits 1 if there was one.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import harmony
from tests.training.random_usage import KNOWN, OPERATIONS, Steps, Usage, Way

MOST_OPERATIONS = 8


def main() -> int:
    """Run the usages and say what became of them."""
    args = parse_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    harmony.virtual_gpus(count=2, memory="64MiB")
    operations = tuple(args.only or (OPERATIONS if args.all else KNOWN))
    draw = random.Random(args.seed)
    found: Counter[str] = Counter()
    for number in range(args.number):
        way, steps = random_usage(draw, operations)
        failure = failure_of(way, steps)
        if failure is not None:
            way, steps, failure = shortened(way, steps, failure)
            print(f"{number}: {way} {steps}\n    {failure}", flush=True)
        found["the same" if failure is None else failure.split(":")[0]] += 1
    counts = ", ".join(f"{count} {what}" for what, count in found.items())
    print(f"{args.number} usages: {counts}")
    return 0 if set(found) == {"the same"} else 1


def random_usage(draw: random.Random, operations: tuple[str, ...]) -> tuple[Way, Steps]:
    """A way and a sequence of operations, with a step after most."""
    way = Way(
        draw.choice(["step", "dropin"]),
        draw.choice([2, 4, 8]),
        draw.choice([1, 2]),
        draw.choice(["host", "auto"]),
    )
    steps: list[tuple[str, int]] = []
    for _ in range(draw.randint(1, MOST_OPERATIONS)):
        steps.append((draw.choice(operations), draw.randrange(6)))
        if draw.random() < 0.6:
            steps.append(("step", 0))
    return way, tuple(steps)


def failure_of(way: Way, steps: Steps) -> str | None:
    """What went wrong, its kind first; None if nothing did."""
    try:
        Usage(way).run(steps)
    except AssertionError as error:
        return f"DIFFERENT: {error}"
    except harmony.HarmonyError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"RAW: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
    return None


def shortened(way: Way, steps: Steps, failure: str) -> tuple[Way, Steps, str]:
    """Leave out operations as long as it fails in the same kind of way."""
    index = 0
    while index < len(steps):
        fewer = (*steps[:index], *steps[index + 1 :])
        now = failure_of(way, fewer)
        if now is not None and now.split(":")[0] == failure.split(":")[0]:
            steps, failure = fewer, now
        else:
            index += 1
    return way, steps, failure


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--number", type=int, default=200, help="how many usages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="operations known to fail, too")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, help="only these operations")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
