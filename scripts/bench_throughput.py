#!/usr/bin/env python3
"""Throughput of Harmony on a virtual GPU against plain PyTorch that has all the memory it wants.

    scripts/bench_throughput.py [--json] [--rounds 5]

Harmony trains a GPT on one virtual GPU whose memory is a quarter of the training state; plain
PyTorch trains it on the CPU, with activation checkpointing a block, so that both recompute. Both
have one compute thread and the same microbatches (Harmony's parameter update runs on a second
thread, behind the backward: that is what it is for). The two take turns; the figure is the median
over the rounds of the ratio of tokens per second. Exits 1 if it is below the bar of 0.85.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import GPT, Batch, batches, loss_fn, make_model

import harmony
from harmony.core.units import format_bytes

BAR = 0.85
WIDTH, DEPTH, HEADS, CONTEXT = 512, 8, 8, 128
BATCH, MICROBATCH = 8, 2
STATE_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and two AdamW moments
OPTIMIZER = {"lr": 1e-4, "fused": True}

Step = Callable[[torch.Tensor, torch.Tensor], float]


def main() -> int:
    """Run the rounds, print the figure, and return 1 if it misses the bar."""
    args = parse_arguments()
    torch.set_num_threads(1)
    model = make_model(WIDTH, DEPTH, HEADS, CONTEXT)
    state_nbytes = STATE_BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    memory_nbytes = state_nbytes // 4
    harmony.virtual_gpus(count=1, memory=memory_nbytes, num_threads=1)
    steps = {"harmony": harmony_step(model), "plain": plain_step()}
    data = list(batches(args.steps * (args.rounds + 1), BATCH, CONTEXT))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        share = data[number * args.steps : (number + 1) * args.steps]
        for name, step in steps.items():
            rate = tokens_per_s(step, share)
            if number:  # round 0 warms up: capture, measuring, planning, caches
                rates[name].append(rate)
                if not args.json:
                    print(f"round {number}  {name:8}  {rate:8.0f} tokens/s", flush=True)
    ratios = [h / p for h, p in zip(rates["harmony"], rates["plain"], strict=True)]
    ratio = statistics.median(ratios)
    figures = {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio >= BAR,
        "ratios": ratios,
        "tokens_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "training_state_nbytes": state_nbytes,
        "gpu_memory_nbytes": memory_nbytes,
    }
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print(
            f"training state {format_bytes(state_nbytes)}, GPU {format_bytes(memory_nbytes)}\n"
            f"Harmony has {ratio:.2f} of the throughput of plain PyTorch with all the memory "
            f"(rounds: {min(ratios):.2f} to {max(ratios):.2f}); the bar is {BAR}: "
            f"{'held' if ratio >= BAR else 'MISSED'}"
        )
    return 0 if ratio >= BAR else 1


def harmony_step(net: GPT) -> Step:
    """One training step with Harmony."""
    model = harmony.Harmony(
        net,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs=OPTIMIZER,
        loss_fn=loss_fn,
        microbatch_size=MICROBATCH,
    )
    return lambda inputs, targets: float(model.train_step(inputs, targets))


def plain_step() -> Step:
    """One training step of plain PyTorch that recomputes each block in the backward."""
    net = make_model(WIDTH, DEPTH, HEADS, CONTEXT)
    optimizer = torch.optim.AdamW(net.parameters(), **OPTIMIZER)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        x = net.tokens(tokens) + net.positions(torch.arange(tokens.shape[1]))
        x = torch.nn.functional.dropout(x, net.dropout, net.training)
        for block in net.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return net.head(net.norm(x))

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        parts = zip(inputs.split(MICROBATCH), targets.split(MICROBATCH), strict=True)
        for x, y in parts:
            loss = loss_fn(forward(x), y) * (len(x) / len(inputs))
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


def tokens_per_s(step: Step, data: list[Batch]) -> float:
    """Tokens per second over some steps."""
    started = time.perf_counter()
    for inputs, targets in data:
        step(inputs, targets)
    return len(data) * BATCH * CONTEXT / (time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
