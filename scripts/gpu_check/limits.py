"""Whether training stays within the memory that it was given."""

from __future__ import annotations

import random
import statistics

import torch

import harmony
from gpu_check.models import TINY, Shape, batches, loss_fn, make_model
from gpu_check.steps import Note

CASES = 20


def run(note: Note, small: bool) -> bool:
    """Note what PyTorch reserves and allocates at most, over the limit; False if one is above.

    It reserves 2 MiB at a time: the few of a tiny model are above theirs, and nothing follows.
    """
    chance = random.Random(0)
    over, shares = [], []
    for number in range(2 if small else CASES):
        shape = TINY if small else _drawn(chance)
        state = 16 * shape.num_params
        limit = int(state * chance.uniform(0.3, 1.2)) + ((4 if small else 96) << 20)
        reserved, allocated, planned = _peaks(shape, limit)
        shares.append(reserved / limit)
        note(
            what=f"case {number}",
            params=shape.num_params,
            limit_mib=limit / 2**20,
            planned_of_limit=planned / limit,
            allocated_of_limit=allocated / limit,
            reserved_of_limit=reserved / limit,
        )
        if reserved > limit:
            over.append(number)
    note(
        what="reserved over the limit",
        median=statistics.median(shares),
        largest=max(shares),
        cases_above_it=over,
    )
    return small or not over


def _drawn(chance: random.Random) -> Shape:
    width = 64 * chance.randint(4, 16)
    return Shape(
        "drawn",
        width,
        chance.randint(4, 16),
        width // 64,
        3 * width,
        vocab=4096,
        batch=chance.choice((4, 8, 16)),
        context=chance.choice((128, 256, 512)),
    )


def _peaks(shape: Shape, limit: int) -> tuple[int, int, int]:
    """Bytes reserved, allocated and planned on the first GPU at most."""
    torch.cuda.empty_cache()
    model = harmony.Harmony(
        make_model(shape),
        optimizer=torch.optim.AdamW,
        loss_fn=loss_fn,
        devices=1,
        device_memory=limit,
    )
    for number, (x, y) in enumerate(batches(shape, 4)):
        if number == 1:  # the first one measures
            torch.cuda.synchronize(0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(0)
        model.train_step(x, y)
    reserved, allocated = torch.cuda.max_memory_reserved(0), torch.cuda.max_memory_allocated(0)
    planned = max(model.plan.peak_nbytes) if model.plan is not None else 0
    model.close()
    return reserved, allocated, planned
