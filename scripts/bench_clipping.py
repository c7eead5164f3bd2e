#!/usr/bin/env python3
"""What clipping costs: steps with and without ``max_grad_norm``, in turns.

    OMP_WAIT_POLICY=passive scripts/bench_clipping.py [--json] [--rounds 7] [--steps 3]
        [--width 512] [--depth 8] [--context 128] [--batch 8] [--slowdown 2]

A GPT is trained by AdamW on one virtual GPU of which it may use a quarter of the training state,
with updates in their own step and with ``overlap_updates=True``, each with and without clipping.
Kernels of the virtual GPU take ``--slowdown`` times as long as the CPU takes for them, and wait
for the rest, so that the host has its cores for the update, as beside a real GPU. A figure is the
median over the rounds of the ratio, within a round, of the seconds of a step. Exits 1 if clipping
costs more than 1 % where updates overlap.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import batches, loss_fn, make_model

import harmony

BAR = 1.01
WHEN = ("own step", "late")
WAYS = {
    f"{when}, {how}": {"overlap_updates": when == "late", "max_grad_norm": norm}
    for when in WHEN
    for how, norm in (("unclipped", None), ("clipped", 0.1))
}


def main() -> int:
    """Run the rounds, print the figures, and return 1 if they miss the bar."""
    args = parse_arguments()
    warnings.simplefilter("ignore", harmony.HarmonyWarning)
    torch.set_num_threads(1)
    shape = (args.width, args.depth, 8, args.context)
    state_nbytes = 16 * sum(p.numel() for p in make_model(*shape).parameters())
    harmony.virtual_gpus(count=1, memory=2 * state_nbytes, num_threads=1, slowdown=args.slowdown)
    models = {
        name: make(shape, {**options, "device_memory": state_nbytes // 4})
        for name, options in WAYS.items()
    }
    data = list(batches(args.steps, args.batch, args.context))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(args.rounds + 1):
        for name in list(models)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            for batch in data:
                models[name].train_step(*batch)
            if number:  # round 0 captures, measures and plans
                seconds[name].append((time.perf_counter() - started) / args.steps)
    found = figures(seconds, args.batch * args.context)
    print(json.dumps(found) if args.json else text_of(found))
    return int(found["late, clipped / unclipped"] > BAR)


def make(shape: tuple[int, int, int, int], options: dict[str, Any]) -> harmony.Harmony:
    """Return one of the models; all have the same parameters and the same batches."""
    return harmony.Harmony(
        make_model(*shape),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4},
        loss_fn=loss_fn,
        microbatch_size=2,
        replan=False,
        **options,
    )


def figures(seconds: dict[str, list[float]], num_tokens: int) -> dict[str, float]:
    """Medians: of the seconds, and of ratios within rounds."""
    found = {"tokens a step": float(num_tokens)}
    found |= {f"{name}, s a step": statistics.median(held) for name, held in seconds.items()}
    for when in WHEN:
        pairs = zip(seconds[f"{when}, clipped"], seconds[f"{when}, unclipped"], strict=True)
        ratios = [clipped / unclipped for clipped, unclipped in pairs]
        found[f"{when}, clipped / unclipped"] = statistics.median(ratios)
        found |= {f"{when}, {of.__name__} of rounds": of(ratios) for of in (min, max)}
    return found


def text_of(found: dict[str, float]) -> str:
    """The figures, a line each."""
    return "\n".join(f"{name:32} {value:9.3f}" for name, value in found.items())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (7)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round (3)")
    parser.add_argument("--width", type=int, default=512, help="of the GPT (512)")
    parser.add_argument("--depth", type=int, default=8, help="blocks (8)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a sample (128)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (8)")
    parser.add_argument("--slowdown", type=float, default=2.0, help="of the virtual GPU (2)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
