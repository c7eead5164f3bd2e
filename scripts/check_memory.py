#!/usr/bin/env python3
"""Reserved memory of random models under random limits, on the stand-in for the CUDA runtime.

    scripts/on-standin scripts/check_memory.py [--cases 100] [--first 0]

Each case trains a small Llama with AdamW for 4 steps on 1, 2 or 4 GPUs, under a limit that is part
of what it would take without one, and at least the 64 MiB from which PyTorch's allocator is held
to it. A line a case: the most that the plan foresees, that tensors took and that the allocator
reserved, of the limit, on the GPU that reserved most. At the end: the cases above the limit, and
what is reserved beyond the plan's bound. A model for which no plan fits counts for none.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import warnings
from collections.abc import Sequence

import torch

import harmony
from gpu_check.models import Shape, batches, loss_fn, make_model
from harmony.profiling import server
from harmony.runtime.exec.memory_bound import LEAST_NBYTES
from tests.cuda import standin

STEPS = 4


def drawn(chance: random.Random) -> Shape:
    """Return sizes of a Llama of 1 to 18 million parameters."""
    width = 64 * chance.randint(2, 8)
    return Shape(
        "drawn",
        width,
        chance.randint(3, 10),
        width // 64,
        3 * width,
        vocab=1024,
        batch=chance.choice((2, 4, 8)),
        context=chance.choice((32, 64)),
    )


def run(number: int) -> tuple[int, list[int], list[int], list[int]]:
    """Return the limit, and per GPU the bytes planned, allocated and reserved at most."""
    chance = random.Random(number)
    shape, gpus = drawn(chance), chance.choice((1, 2, 4))
    limit = max(LEAST_NBYTES, int(16 * shape.num_params * chance.uniform(0.3, 1.2)))
    torch.cuda.empty_cache()
    model = harmony.Harmony(
        make_model(shape),
        optimizer=torch.optim.AdamW,
        loss_fn=loss_fn,
        devices=gpus,
        device_memory=limit,
    )
    held, taken = [0] * gpus, [0] * gpus
    for x, y in batches(shape, STEPS):
        model.train_step(x, y)  # each run of a schedule begins its peaks anew
        for gpu in range(gpus):
            taken[gpu] = max(taken[gpu], torch.cuda.max_memory_allocated(gpu))
            held[gpu] = max(held[gpu], torch.cuda.max_memory_reserved(gpu))
    assert model.plan is not None
    planned = [*model.plan.peak_nbytes, *[0] * gpus][:gpus]
    model.close()
    return limit, planned, taken, held


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    asked = parser.parse_args(argv)
    if not standin.is_loaded():
        print("check_memory: on the stand-in only (scripts/on-standin)", file=sys.stderr)
        return 2
    standin.install()
    torch.set_num_threads(1)
    server._LARGER_THAN_CACHES_NBYTES = 2**20  # what updates cost is not asked here
    warnings.simplefilter("ignore", harmony.HarmonyWarning)
    over, refused, shares, gaps = [], 0, [], []
    for number in range(asked.first, asked.first + asked.cases):
        try:
            limit, planned, allocated, reserved = run(number)
        except harmony.DoesNotFitError as error:
            refused += 1
            print(f"case {number}: refused: {str(error)[:100]}", flush=True)
            continue
        most = max(range(len(reserved)), key=reserved.__getitem__)
        figures = (planned[most] / limit, allocated[most] / limit, reserved[most] / limit)
        shares.append(reserved[most] / max(planned[most], 1))
        gaps.append((reserved[most] - planned[most]) / 2**20)
        over += [number] if reserved[most] > limit else []
        print(
            f"case {number}: {len(reserved)} GPUs, limit {limit / 2**20:.0f} MiB: "
            "planned {:.2f}, allocated {:.2f}, reserved {:.2f} of it".format(*figures),
            flush=True,
        )
    if not shares:
        return 1
    print(
        f"{len(shares)} cases, {refused} more refused; above the limit: {over or 'none'}; "
        f"reserved, of the plan's bound: median {statistics.median(shares):.2f}, largest "
        f"{max(shares):.2f}; beyond it, in MiB: median {statistics.median(gaps):.0f}, largest "
        f"{max(gaps):.0f}"
    )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
