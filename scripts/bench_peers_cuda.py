#!/usr/bin/env python3
"""What Harmony and its peers move and wait for in a step, counted on the stand-in for CUDA.

    scripts/on-standin scripts/bench_peers_cuda.py [--json] [--steps 3]

A Llama trains on the same batches by plain PyTorch with all the memory it wants and activation
checkpointing, by FSDP2 with CPU offload, and by Harmony. FSDP2 takes the batch in 1, 2 or 8
parts; what it then allocates at most is the memory that Harmony is given. All of them run the
forward of a block again in its backward. Counted in a steady step: bytes from and to the host,
pageable copies, waits, allocations of the driver's, and the losses. Times are not compared: no
link of the stand-in has a speed. FSDP2 runs on one GPU here, since the stand-in has no NCCL.
Exits 1 if Harmony moves more bytes than FSDP2 does with as much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import harmony
from gpu_check.models import Shape, batches, loss_fn, make_model
from gpu_check.speed import accumulating, checkpointed, sharded
from tests.cuda import standin

SHAPE = Shape("small", 128, 8, 4, 384, vocab=512, batch=8, context=64)
PARTS = (1, 2, 8)
WARM = 3
MOVED = ("copy_in", "pageable_in", "copy_out", "pageable_out")

Step = Callable[[torch.Tensor, torch.Tensor], float]


def main() -> int:
    """Run everybody, print a table, and return 1 if Harmony moves more."""
    args = parse_arguments()
    if not standin.is_loaded():
        print("bench_peers_cuda: on the stand-in only (scripts/on-standin)", file=sys.stderr)
        return 2
    if args.who:
        print(json.dumps(count(args.who, args.precision, args.parts, args.memory, args.steps)))
        return 0
    rows: list[dict[str, Any]] = []
    for precision in ("fp32", "bf16"):
        rows.append(run("plain", precision, 8, 0, args.steps))
        for parts in PARTS:
            theirs = run("FSDP2", precision, parts, 0, args.steps)
            memory = theirs["allocated"]
            ours = run("Harmony", precision, 0, memory, args.steps)
            rows += [theirs, {**ours, "more": total(ours) > total(theirs)}]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print(*table(rows), sep="\n")
    return int(any(row.get("more") for row in rows))


def run(who: str, precision: str, parts: int, memory: int, steps: int) -> dict[str, Any]:
    """Train in a process of its own; return what was counted."""
    words = [sys.executable, __file__, "--who", who, "--precision", precision]
    words += ["--parts", str(parts), "--memory", str(memory), "--steps", str(steps)]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "FAKECUDA_GPUS": "1"},
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"who": who, "precision": precision, "parts": parts, **row}


def count(who: str, precision: str, parts: int, memory: int, steps: int) -> dict[str, Any]:
    """Train here; return what a step takes, after those that warm up."""
    torch.set_num_threads(1)
    standin.install()
    step = make_step(who, precision, parts, memory)
    losses = []
    for number, (x, y) in enumerate(batches(SHAPE, WARM + steps)):
        if number == WARM:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = standin.counters()
        losses.append(step(x, y))
    torch.cuda.synchronize()
    after = standin.counters()
    calls = {name: (after[name].calls - before[name].calls) / steps for name in after}
    moved = {name: (after[name].nbytes - before[name].nbytes) / steps for name in MOVED}
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "in": moved["copy_in"] + moved["pageable_in"],
        "out": moved["copy_out"] + moved["pageable_out"],
        "pageable": calls["pageable_in"] + calls["pageable_out"],
        "waits": calls["synchronize"] + calls["device_synchronize"],
        "mallocs": calls["malloc"] + calls["free"],
        "losses": losses,
    }


def make_step(who: str, precision: str, parts: int, memory: int) -> Step:
    """A training step of somebody's."""
    net = make_model(SHAPE)
    if who == "Harmony":
        model = harmony.Harmony(
            net,
            optimizer=torch.optim.AdamW,
            loss_fn=loss_fn,
            devices=1,
            device_memory=memory,
            precision=precision,
            activations="recompute",
            seed=0,
        )
        return lambda x, y: float(model.train_step(x, y))
    if who == "FSDP2":
        return accumulating(*sharded(net, precision), None, parts)
    net = checkpointed(net).to("cuda:0")
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    return accumulating(net, optimizer, precision, parts)


def total(row: dict[str, Any]) -> float:
    """Bytes over both directions of the link."""
    return float(row["in"] + row["out"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for people."""
    weights = 4 * SHAPE.num_params
    lines = [
        f"Llama of {SHAPE.num_params / 1e6:.1f} M parameters, {SHAPE.num_tokens} tokens a step;"
        f" bytes in units of its fp32 weights ({weights / 2**20:.1f} MiB)",
        f"{'':24}{'allocated':>10}{'in':>8}{'out':>8}{'pageable':>10}{'waits':>7}"
        f"{'mallocs':>9}  loss",
    ]
    for row in rows:
        how = f", {row['parts']} parts" if row["parts"] else ""
        name = f"{row['who']}, {row['precision']}{how}"
        units = [row[key] / weights for key in ("allocated", "in", "out")]
        lines.append(
            f"{name:24}{units[0]:10.2f}{units[1]:8.2f}{units[2]:8.2f}{row['pageable']:10.0f}"
            f"{row['waits']:7.0f}{row['mallocs']:9.0f}  {row['losses'][-1]:.6f}"
            f"{'  MORE BYTES' if row.get('more') else ''}"
        )
    return lines


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--steps", type=int, default=3)
    for name, kind in (("who", str), ("precision", str), ("parts", int), ("memory", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
