"""Tokens per second, beside what was predicted and what others reach in the same process order.

All train the same Llama with the same number of tokens a step. Plain PyTorch and the others keep
to their own best known settings: activation checkpointing a block, bfloat16 by autocast (plain)
or by their own mixed precision.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import harmony
from gpu_check.models import SHAPES, TINY, Block, Llama, Shape, batches, loss_fn, make_model
from gpu_check.steps import Note
from harmony.profiling.catalog import known_gpu
from harmony.runtime.host.limits import available_host_nbytes

STATE_NBYTES = 16
"""Bytes a parameter of fp32 weight, gradient and two AdamW moments."""

STEPS, BAR = 4, 0.10
PARTS = 8
"""Parts of a batch that the others accumulate gradients over."""

Trainer = Callable[[torch.Tensor, torch.Tensor], float]


def run(name: str, note: Note, small: bool) -> bool:
    """Note tokens per second of Harmony, and of others where they run."""
    shape = TINY if small else SHAPES[name]
    needed = int(1.15 * STATE_NBYTES * shape.num_params)
    if needed > available_host_nbytes():
        note(skipped=f"{name}: {needed >> 30} GiB of host memory are needed")
        return True
    precisions = ("bf16", "fp32") if name == "1B" else ("bf16",)
    good = True
    for precision in precisions:
        for who, make in TRAINERS.items():
            if who != "harmony" and (why := _not_run(who, shape)):
                note(what=f"{who}, {precision}", not_run=why)
                continue
            good &= _noted(who, make, shape, precision, note)
    return good


def predict(note: Note, small: bool) -> bool:
    """Note predicted and measured steps for several memories; False if one is off by a tenth."""
    base = TINY if small else replace(SHAPES["1B"], depth=8, context=1024)
    off = []
    for share in (0.15, 0.3, 0.6) if not small else (0.5,):
        for batch in (8, 32):
            shape = replace(base, batch=batch)
            limit = int(share * STATE_NBYTES * shape.num_params) + ((4 if small else 1024) << 20)
            model = _model(shape, "fp32", device_memory=limit)
            taken = [_timed(model.train_step, x, y)[0] for x, y in batches(shape, 2 + STEPS)]
            assert model.plan is not None
            measured, predicted = statistics.median(taken[2:]), model.plan.step_s
            off.append(measured / predicted - 1)
            note(
                what=f"{batch} samples, {share:.0%} of the state",
                predicted_s=predicted,
                measured_s=measured,
                off=off[-1],
            )
            model.close()
    return small or max(map(abs, off)) <= BAR


def _noted(
    who: str, make: Callable[[Shape, str], Trainer], shape: Shape, precision: str, note: Note
) -> bool:
    """Train for a few steps and note the rate; a failure of others is noted, not ours."""
    gc.collect()
    torch.cuda.empty_cache()
    for number in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(number)
    try:
        step = make(shape, precision)
        taken, losses = [], []
        for x, y in batches(shape, 1 + STEPS):
            seconds, loss = _timed(step, x, y)
            taken.append(seconds)
            losses.append(float(loss))
    except Exception as error:
        note(what=f"{who}, {precision}", failed=f"{type(error).__name__}: {error}"[:500])
        return who != "harmony"
    typical = statistics.median(taken[1:])
    note(
        what=f"{who}, {precision}",
        params=shape.num_params,
        tokens_a_step=shape.num_tokens,
        tokens_per_s=shape.num_tokens / typical,
        step_s=typical,
        first_step_s=taken[0],
        share_of_peak=_share_of_peak(shape, precision, typical),
        reserved_gib=torch.cuda.max_memory_reserved(0) / 2**30,
        losses=losses,
    )
    return True


def _timed(step: Callable[..., Any], x: torch.Tensor, y: torch.Tensor) -> tuple[float, Any]:
    _wait()
    start_s = time.perf_counter()
    loss = step(x, y)
    _wait()
    return time.perf_counter() - start_s, loss


def _wait() -> None:
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)


def _share_of_peak(shape: Shape, precision: str, seconds: float) -> float | str:
    """Of what all GPUs could compute, without recompute; by the catalog of `harmony-run plan`."""
    gpu = known_gpu(torch.cuda.get_device_name(0))
    if gpu is None:
        return "the GPU is not in the catalog"
    peak = gpu.flops.get(precision, gpu.flops["fp32"]) * torch.cuda.device_count()
    return shape.step_flops() / seconds / peak


def _not_run(who: str, shape: Shape) -> str:
    """Say why somebody else is not tried; empty if they are."""
    if who == "plain":
        free = torch.cuda.mem_get_info(0)[0]
        needed = STATE_NBYTES * shape.num_params + (4 << 30 if shape.width > 64 else 0)
        if needed > free:
            return f"needs {needed >> 30} GiB, {free >> 30} are free"
    if who == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return "not installed"
    return ""


def _amp(precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def _model(shape: Shape, precision: str, **options: Any) -> harmony.Harmony:
    if precision == "bf16" and "precision" in inspect.signature(harmony.Harmony).parameters:
        options["precision"] = "bf16"
    return harmony.Harmony(
        make_model(shape), optimizer=torch.optim.AdamW, loss_fn=loss_fn, seed=0, **options
    )


def _by_harmony(shape: Shape, precision: str) -> Trainer:
    model = _model(shape, precision)
    own = model._engine.options
    casts = precision == "bf16" and not hasattr(own, "precision")

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        with _amp(precision) if casts else contextlib.nullcontext():
            return float(model.train_step(x, y))

    return step


class _Checkpointed(nn.Module):
    """A block whose forward runs again in the backward."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: torch.Tensor) -> Any:
        """As the block's."""
        return checkpoint(self.block, *args, use_reentrant=False)


def checkpointed(net: Llama) -> Llama:
    """Let every block run again in the backward."""
    for number, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        net.blocks[number] = _Checkpointed(block)
    return net


def _by_plain(shape: Shape, precision: str) -> Trainer:
    """Everything on the first GPU, the batch in microbatches of an eighth."""
    net = checkpointed(make_model(shape)).to("cuda:0")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    return accumulating(net, optimizer, precision, PARTS)


def accumulating(
    net: nn.Module, optimizer: torch.optim.Optimizer, precision: str | None, parts: int
) -> Trainer:
    """A step whose gradients are those of several parts of the batch.

    Args:
        precision: of the autocast around each forward; None: without one.
    """

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        for rows, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with _amp(precision) if precision else contextlib.nullcontext():
                loss = loss_fn(net(rows.to("cuda:0")), targets.to("cuda:0")) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        return total

    return step


def _by_fsdp(shape: Shape, precision: str) -> Trainer:
    return accumulating(*sharded(make_model(shape), precision), None, PARTS)


def sharded(net: Llama, precision: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """FSDP2 with CPU offload, in one process on the first GPU, and an optimizer on the host."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        torch.cuda.set_device(0)
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    net = checkpointed(net)
    for part in (*net.blocks, net):
        fully_shard(part, mp_policy=policy, offload_policy=CPUOffloadPolicy())
    return net, torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


def _by_deepspeed(shape: Shape, precision: str) -> Trainer:
    """ZeRO-3 with parameters and optimizer on the CPU, in one process."""
    import deepspeed  # type: ignore[import-not-found]

    config = {
        "train_micro_batch_size_per_gpu": max(1, shape.batch // PARTS),
        "gradient_accumulation_steps": PARTS,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": True},
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
    }
    net = checkpointed(make_model(shape))
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)

    def step(x: torch.Tensor, y: torch.Tensor) -> float:
        total = 0.0
        for rows, targets in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            loss = loss_fn(engine(rows.to("cuda:0")), targets.to("cuda:0"))
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / PARTS
        return total

    return step


TRAINERS: dict[str, Callable[[Shape, str], Trainer]] = {
    "harmony": _by_harmony,
    "plain": _by_plain,
    "FSDP2 with CPU offload": _by_fsdp,
    "deepspeed": _by_deepspeed,
}
