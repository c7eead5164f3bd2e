#!/usr/bin/env python3
"""What it is worth, with clipping, that updates run into the next step.

    scripts/bench_overlap.py [--json] [--rounds 7] [--steps 3] [--width 1024] [--depth 12]
                             [--batch 4] [--slowdown 3] [--link 2GB/s] [--gpus 1] [--memory 24MiB]

A chain of linear layers is trained by AdamW with ``max_grad_norm`` on virtual GPUs, once with
``overlap_updates=True`` and once without. Kernels of a virtual GPU take ``--slowdown`` times as
long as the CPU takes for them; the rest of that time it waits, so that the host has its cores for
the update, as beside a real GPU. Links are throttled. Both models take turns in one process, each
goes first every other round; a figure is the median over the rounds of the seconds of a step.
Their parameters must be the same bits in the end.
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
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harmony
from harmony.planner.search.overlap import NAME, OWN_STEP
from harmony.vgpu.api import virtual_gpus

WAYS = ("serial", "overlapped")


def main() -> int:
    """Run the rounds, print the figures; return 1 if the two ways differ in any bit."""
    args = parse_arguments()
    warnings.simplefilter("ignore", harmony.HarmonyWarning)
    torch.set_num_threads(1)
    virtual_gpus(count=args.gpus, memory="1GiB", link=args.link, slowdown=args.slowdown)
    models = {way: make(args, overlap=way == "overlapped") for way in WAYS}
    batch = torch.randn(args.batch, args.width), torch.randn(args.batch, args.width)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    updates: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way in WAYS if number % 2 else WAYS[::-1]:
            started = time.perf_counter()
            for _ in range(args.steps):
                models[way].train_step(*batch)
            taken = (time.perf_counter() - started) / args.steps
            if number:  # round 0 captures, measures and plans
                seconds[way].append(taken)
                updates[way].append(update_s(models[way]))
    found = figures(models, seconds, updates)
    print(json.dumps(found) if args.json else text_of(found))
    return int(not found["same_bits"])


def make(args: argparse.Namespace, *, overlap: bool) -> harmony.Harmony:
    """Return one of the two models; both have the same parameters."""
    torch.manual_seed(0)
    layers = [part for _ in range(args.depth) for part in (linear(args.width), nn.Tanh())]
    return harmony.Harmony(
        nn.Sequential(*layers),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-4},
        max_grad_norm=0.1,
        loss_fn=nn.functional.mse_loss,
        mode="pp",
        microbatch_size=max(1, args.batch // 4),
        devices=args.gpus,
        device_memory=args.memory,
        overlap_updates=overlap,
        replan=False,
        seed=0,
    )


def linear(width: int) -> nn.Linear:
    """A square layer."""
    return nn.Linear(width, width, bias=False)


def update_s(model: harmony.Harmony) -> float:
    """Seconds that the host has updated in the last step."""
    assert model.last_timeline is not None
    return sum(span.duration_s for span in model.last_timeline.spans if span.kind == "update")


def figures(
    models: dict[str, harmony.Harmony],
    seconds: dict[str, list[float]],
    updates: dict[str, list[float]],
) -> dict[str, Any]:
    """Return medians, their ratio, what was predicted, and whether the bits are the same."""
    median = {way: statistics.median(taken) for way, taken in seconds.items()}
    pairs = zip(*(model.parameters() for model in models.values()), strict=True)
    plan = models["overlapped"].plan
    assert plan is not None
    late = next(decision for decision in plan.decisions if decision.name == NAME)
    predicted = {"serial": float(dict(late.alternatives)[OWN_STEP]), "overlapped": plan.step_s}
    return {
        "step_s": median,
        "ratio": median["serial"] / median["overlapped"],
        "ratios": [a / b for a, b in zip(*seconds.values(), strict=True)],
        "update_s": {way: statistics.median(taken) for way, taken in updates.items()},
        "predicted_s": predicted,
        "predicted_ratio": predicted["serial"] / plan.step_s,
        "decision": f"{late.chosen}: {late.why}",
        "taken": models["overlapped"]._engine.late.num_steps,
        "same_bits": all(bool((one == other).all()) for one, other in pairs),
    }


def text_of(found: dict[str, Any]) -> str:
    """The figures in words."""
    low, high = min(found["ratios"]), max(found["ratios"])
    share = found["update_s"]["serial"] / found["step_s"]["serial"]
    lines = [
        f"{way:<11} {found['step_s'][way] * 1e3:8.1f} ms a step, predicted "
        f"{found['predicted_s'][way] * 1e3:.1f} ms, updates {found['update_s'][way] * 1e3:.1f} ms"
        for way in WAYS
    ]
    return "\n".join(
        [
            *lines,
            f"serial / overlapped {found['ratio']:.2f} ({low:.2f} to {high:.2f} by round), "
            f"predicted {found['predicted_ratio']:.2f}; updates are {share:.0%} of the serial one",
            f"the plan: {found['decision']}",
            f"steps that took over updates: {found['taken']}; same bits: {found['same_bits']}",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (7)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round (3)")
    parser.add_argument("--width", type=int, default=1024, help="of the layers (1024)")
    parser.add_argument("--depth", type=int, default=12, help="layers (12)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (4)")
    parser.add_argument("--slowdown", type=float, default=3.0, help="of the virtual GPUs (3)")
    parser.add_argument("--link", default="2GB/s", help="bandwidth of each link (2GB/s)")
    parser.add_argument("--gpus", type=int, default=1, help="virtual GPUs (1)")
    parser.add_argument("--memory", default="24MiB", help="of each GPU (24MiB)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
