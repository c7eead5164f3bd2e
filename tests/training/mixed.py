"""References for ``precision="bf16"``, ``"fp16"``: fifteen lines of PyTorch, and FSDP2 itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

import harmony
from harmony.capture.replay.kept_types import names_kept
from tests import devices

from .plain import Run, computing, gradients_of, moved, params_of

BF16 = torch.bfloat16
LossFn = Callable[[Any, Any], torch.Tensor]
Forward = Callable[[nn.Module, Any], Any]
Make = Callable[..., torch.optim.Optimizer]


def cast(net: nn.Module, inputs: Any, dtype: torch.dtype) -> Any:
    """Run the forward with all that FSDP2 casts at the root; autograd casts gradients back."""

    def to_dtype(held: Any) -> Any:
        is_cast = isinstance(held, torch.Tensor) and held.is_floating_point()
        return held.to(dtype) if is_cast else held

    kept = names_kept(net)
    held = {n: p if n in kept else to_dtype(p) for n, p in net.named_parameters()}
    return torch.func.functional_call(net, held, (tree_map(to_dtype, inputs),))


in_bf16: Forward = partial(cast, dtype=BF16)
in_fp16: Forward = partial(cast, dtype=torch.float16)


def by_fsdp(net: nn.Module, inputs: Any) -> Any:
    """Run the forward of a module that FSDP2 has wrapped, which casts by itself."""
    return net(inputs)


def train(
    net: nn.Module,
    batches: Sequence[tuple[Any, Any]],
    make: Make,
    loss_fn: LossFn,
    *,
    microbatch: int,
    forward: Forward = in_bf16,
    shares: int = 1,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    device: torch.device | None = None,
) -> Run:
    """Train a module in place, on the CPU or ``device``; with shares, add their sums in order."""
    optimizer = make(net.parameters())
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    run = Run()
    for step, (inputs, targets) in enumerate(batches):
        size, index, total = len(targets), 0, torch.zeros(())
        sums: list[dict[str, torch.Tensor | None]] = []
        for share in range(shares):
            optimizer.zero_grad()
            end = (share + 1) * size // shares
            with computing(net, device or torch.device("cpu")) as there:
                for low in range(share * size // shares, end, microbatch):
                    part = slice(low, low + microbatch)
                    x, y = moved((inputs[part], targets[part]), there)
                    torch.manual_seed(harmony.microbatch_seed(step, index))
                    index += 1
                    loss = loss_fn(forward(net, x), y)
                    scaler.scale(loss * (microbatch / size)).backward()
                    total = total + loss.detach().cpu() * (microbatch / size)
            sums.append({n: p.grad for n, p in net.named_parameters()})
        for name, param in net.named_parameters():
            parts = [grads[name] for grads in sums if grads[name] is not None]
            param.grad = parts[0] if parts else None
            for other in parts[1:]:
                param.grad.add_(other)
        scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        run.gradients.append(gradients_of(net))
        scaler.step(optimizer)
        scaler.update()
        run.losses.append(total.to(loss.dtype))
    run.params = params_of(net)
    return run


def train_plain(net: nn.Module, *args: Any, **options: Any) -> Run:
    """Train a copy with casts written out."""
    return train(copy.deepcopy(net), *args, device=devices.reference(), **options)


def train_fsdp(
    net: nn.Module,
    *args: Any,
    dtype: torch.dtype = BF16,
    fp32: tuple[type[nn.Module], ...] = (),
    **options: Any,
) -> Run:
    """Train a copy by FSDP2 on the CPU, the only rank of a gloo group.

    Args:
        fp32: kinds of modules with a policy of their own: in fp32, with results in ``dtype``.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net = copy.deepcopy(net)
    with one_process():
        mesh = dist.init_device_mesh("cpu", (1,))
        own = MixedPrecisionPolicy(torch.float32, torch.float32, output_dtype=dtype)
        for module in [m for m in net.modules() if isinstance(m, fp32)]:
            fully_shard(module, mesh=mesh, mp_policy=own)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        run = train(net, *args, forward=by_fsdp, **options)
        run.params = {name: _whole(param) for name, param in run.params.items()}
        run.gradients = [
            {name: None if g is None else _whole(g) for name, g in grads.items()}
            for grads in run.gradients
        ]
    return run


def _whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor()
    return found


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
