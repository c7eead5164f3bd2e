"""The largest Llama that the host's memory holds, on a part of its weights in GPU memory."""

from __future__ import annotations

import resource
import time
from dataclasses import replace

import torch

import harmony
from gpu_check.models import SHAPES, TINY, batches, loss_fn, make_model
from gpu_check.speed import STATE_NBYTES
from gpu_check.steps import Note
from harmony.runtime.host.limits import available_host_nbytes

MARGIN, STEPS = 1.2, 3


def run(note: Note, small: bool) -> bool:
    """Train as deep a model as fits the host for a few steps; False if its loss does not fall."""
    base = TINY if small else SHAPES["14B"]
    wanted = available_host_nbytes() / (STATE_NBYTES * MARGIN)
    if small:
        wanted = min(wanted, 1e6)
    block = replace(base, depth=1).num_params - replace(base, depth=0).num_params
    depth = max(2, int((wanted - replace(base, depth=0).num_params) / block))
    shape = replace(base, name="largest", depth=depth, batch=4, context=base.context // 2)
    limit = STATE_NBYTES * shape.num_params // 4
    limit = min(limit + (4 << 20), torch.cuda.mem_get_info(0)[0] * 9 // 10)
    start_s = time.perf_counter()
    model = harmony.Harmony(
        make_model(shape),
        optimizer=torch.optim.AdamW,
        loss_fn=loss_fn,
        device_memory=limit,
        seed=0,
    )
    note(what="made", params=shape.num_params, depth=depth, seconds=time.perf_counter() - start_s)
    losses = []
    x, y = next(batches(shape, 1))
    for number in range(STEPS):
        start_s = time.perf_counter()
        losses.append(float(model.train_step(x, y)))
        note(
            what=f"step {number}",
            loss=losses[-1],
            seconds=time.perf_counter() - start_s,
            host_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            state_gib=STATE_NBYTES * shape.num_params / 2**30,
            reserved_gib=torch.cuda.max_memory_reserved(0) / 2**30,
            limit_gib=limit / 2**30,
        )
    return losses[-1] < losses[0]
