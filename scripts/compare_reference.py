#!/usr/bin/env python3
"""Harmony against plain PyTorch, bit for bit: losses of every step, all parameters at the end.

    scripts/compare_reference.py [--json] [--steps 20]

Trains the example's GPT (dropout on, AdamW) for 1, 2 and 4 virtual GPUs, as pipeline and data
parallel, and each time again with plain PyTorch on the CPU: the same microbatches, microbatch i of
step s from the random state of ``harmony.microbatch_seed(s, i)``, gradients accumulated. Where the
plan gives each GPU a share of the batch, the reference sums the gradients of each share by itself
and adds the sums in the order of the GPUs. Exits 1 if a single bit differs.

Tied weights are left out here: packs run one after the other over all microbatches, so a weight
with two uses gets the same summands in another order, and the last bit of its gradient may differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import GPT, Batch, batches, loss_fn, make_model

import harmony

WIDTH, DEPTH, HEADS, CONTEXT, BATCH, MICROBATCH = 64, 6, 4, 32, 8, 2
MEMORY = "2MiB"
GPUS = (1, 2, 4)
MODES = ("pp", "dp")

Ranges = list[list[tuple[int, int]]]
"""Microbatches, per GPU that has a share of the batch."""


@dataclass
class Outcome:
    """What a training run leaves behind."""

    losses: list[float]
    parameters: dict[str, torch.Tensor]


def main() -> int:
    """Compare all settings, print a line each, and return 1 if any differs."""
    args = parse_arguments()
    settings = [(gpus, mode) for gpus in GPUS for mode in MODES if (gpus, mode) != (1, "dp")]
    rows = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for gpus, mode in settings:
            rows.append(processes.submit(compare_one, gpus, mode, args.steps).result())
            if not args.json:
                print(describe(rows[-1]), flush=True)
    equal = all(row["losses"] == row["parameters"] == 0 for row in rows)
    if args.json:
        print(json.dumps({"equal": equal, "settings": rows}, indent=2))
    return 0 if equal else 1


def compare_one(gpus: int, mode: str, steps: int) -> dict[str, object]:
    """Train both ways with one setting, in a process of its own, and count what differs."""
    torch.set_num_threads(1)
    harmony.virtual_gpus(count=gpus, memory=MEMORY)
    data = list(batches(steps, BATCH, CONTEXT))
    outcome, shares = train(data, gpus, mode)
    difference = compare(outcome, train_plain(data, shares))
    return {"gpus": gpus, "mode": mode, "steps": steps, **difference}


def make_net() -> GPT:
    """Make the model; every run starts from the same weights."""
    return make_model(WIDTH, DEPTH, HEADS, CONTEXT, tied=False)


def train(data: list[Batch], gpus: int, mode: str) -> tuple[Outcome, Ranges]:
    """Train with Harmony; also return which microbatches each GPU's share had."""
    model = harmony.Harmony(
        make_net(),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3, "fused": True},
        loss_fn=loss_fn,
        mode=mode,
        microbatch_size=MICROBATCH,
        devices=gpus,
        seed=0,
    )
    losses = [float(model.train_step(inputs, targets)) for inputs, targets in data]
    assert model.plan is not None
    shares = [
        [(at, min(at + MICROBATCH, high)) for at in range(low, high, MICROBATCH)]
        for low, high in model.plan.spec.shares
    ]
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    return Outcome(losses, parameters), shares


def train_plain(data: list[Batch], shares: Ranges) -> Outcome:
    """Train with plain PyTorch on the same microbatches."""
    net = make_net()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    losses = []
    for step, (inputs, targets) in enumerate(data):
        total = torch.zeros(())
        sums: list[list[torch.Tensor]] = []
        index = 0
        for share in shares:
            net.zero_grad()
            for low, high in share:
                torch.manual_seed(harmony.microbatch_seed(step, index))
                index += 1
                weight = (high - low) / len(inputs)
                loss = loss_fn(net(inputs[low:high]), targets[low:high])
                (loss * weight).backward()
                total = total + loss.detach() * weight
            sums.append([p.grad.clone() for p in parameters if p.grad is not None])
        for parameter, *parts in zip(parameters, *sums, strict=True):
            parameter.grad = parts[0]
            for part in parts[1:]:
                parameter.grad += part
        optimizer.step()
        losses.append(float(total))
    return Outcome(losses, net.state_dict())


def compare(found: Outcome, expected: Outcome) -> dict[str, int]:
    """Count the losses and the parameters that differ in any bit."""
    losses = sum(a != b for a, b in zip(found.losses, expected.losses, strict=True))
    assert found.parameters.keys() == expected.parameters.keys()
    differing = [
        name
        for name, value in found.parameters.items()
        if not torch.equal(value, expected.parameters[name])
    ]
    return {"losses": losses, "parameters": len(differing)}


def describe(row: dict[str, object]) -> str:
    """One line of the table."""
    if row["losses"] == row["parameters"] == 0:
        verdict = "every loss and every parameter identical, bit for bit"
    else:
        verdict = f"DIFFERENT: {row['losses']} losses, {row['parameters']} parameters"
    return f"{row['gpus']} GPU  {row['mode']}  {row['steps']} steps  {verdict}"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
