#!/usr/bin/env python3
"""The update of AdamW on the host: Harmony's kernel, PyTorch's forms, and what memory allows.

    OMP_WAIT_POLICY=passive scripts/bench_update.py [--json] [--rounds 7] [--elements 16777216]

Each takes a gradient in bf16, updates a parameter and two moments in fp32, and leaves the new
parameter in bf16 as well: the kernel in one pass (28 bytes an element), PyTorch's fused form and
its default loop with a cast before and after. What memory allows is those bytes at the rate of the
fastest of three passes of PyTorch over as many: a copy, a sum, and a product in place. All take
turns; the figures are of processor time, medians over the rounds of ratios within a round. Exits 1
if the kernel is less than 2 times as fast as the fused form with its casts, or slower than 0.85 of
that rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from harmony.runtime.update.native_step import describe, take_step

BAR_FUSED, BAR_MEMORY = 2.0, 0.85
NUM_BYTES = 4 * 3 * 2 + 2 + 2
"""Of one pass: parameter and moments read and written, the gradient read, the copy written."""


def main() -> int:
    """Run the rounds, print the figures, and return 1 if they miss a bar."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    sides = {**updates(args.elements), **passes(args.elements)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(args.rounds + 1):
        for name, side in sides.items():
            start_s = time.process_time()
            side()
            if number:  # round 0 makes the state
                times[name].append((time.process_time() - start_s) * 1e9 / args.elements)
    found = figures(times)
    if args.json:
        print(json.dumps(found))
    else:
        how = describe(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
        print(f"AdamW ({how}), {args.elements} elements, {args.threads} threads")
        print("\n".join(f"{name:44} {value:8.3f}" for name, value in found.items()))
    return int(found["times fused"] < BAR_FUSED or found["share of memory's rate"] < BAR_MEMORY)


def updates(count: int) -> dict[str, Callable[[], None]]:
    """What is compared, each with memory of its own."""
    half = torch.randn(count).bfloat16()
    copies = [torch.zeros(count, dtype=torch.bfloat16) for _ in range(3)]
    params = [nn.Parameter(torch.ones(count)) for _ in range(3)]
    kinds = [{}, {"fused": True}, {}]
    kernel, *forms = (
        torch.optim.AdamW([param], lr=1e-3, **kind)
        for param, kind in zip(params, kinds, strict=True)
    )
    for param in params:
        param.grad_dtype = None
        param.grad = half.float()
    kernel.step()
    params[0].grad = half

    def by_kernel() -> None:
        take_step(kernel, {id(params[0]): copies[0]})
        if kernel.param_groups[0]["params"]:
            raise SystemExit(f"there is no kernel here: {describe(kernel)}")
        kernel.param_groups[0]["params"] = params[:1]

    def by(index: int) -> Callable[[], None]:
        def step() -> None:
            gradient = params[index].grad
            assert gradient is not None
            gradient.copy_(half)
            forms[index - 1].step()
            copies[index].copy_(params[index].detach())

        return step

    return {"kernel": by_kernel, "fused": by(1), "loop": by(2)}


def passes(count: int) -> dict[str, Callable[[], None]]:
    """Passes over memory, as the rates that it has."""
    a, b, c = (torch.ones(count) for _ in range(3))
    return {
        "copy": lambda: a.copy_(b),
        "sum": lambda: torch.add(a, b, out=c),
        "product": lambda: a.mul_(1.0),
    }


def figures(times: dict[str, list[float]]) -> dict[str, float]:
    """Nanoseconds an element, and ratios within rounds: medians over the rounds."""
    moved = {"copy": 8, "sum": 12, "product": 8}
    rounds = range(len(times["kernel"]))
    limit = [NUM_BYTES * min(times[name][i] / n for name, n in moved.items()) for i in rounds]
    median = statistics.median
    return {
        **{f"{name}, ns an element": median(held) for name, held in times.items()},
        "what memory allows, ns an element": median(limit),
        "times fused": median(times["fused"][i] / times["kernel"][i] for i in rounds),
        "times the loop": median(times["loop"][i] / times["kernel"][i] for i in rounds),
        "share of memory's rate": median(limit[i] / times["kernel"][i] for i in rounds),
    }


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
