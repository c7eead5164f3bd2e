"""References for ``precision="bf16"``: fifteen lines of plain PyTorch, and FSDP2 itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

import harmony

from .plain import Run, gradients_of, params_of

BF16 = torch.bfloat16
LossFn = Callable[[Any, Any], torch.Tensor]
Forward = Callable[[nn.Module, Any], Any]
Make = Callable[..., torch.optim.Optimizer]


def to_bf16(held: Any) -> Any:
    """Cast what FSDP2 casts at the root: every tensor of floating point."""
    if isinstance(held, torch.Tensor) and held.is_floating_point():
        return held.to(BF16)
    return held


def in_bf16(net: nn.Module, inputs: Any) -> Any:
    """Run the forward with parameters and inputs cast; autograd casts the gradients back."""
    held = {name: to_bf16(param) for name, param in net.named_parameters()}
    return torch.func.functional_call(net, held, (tree_map(to_bf16, inputs),))


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
) -> Run:
    """Train a module in place; with shares, add the sums of the shares in their order."""
    optimizer = make(net.parameters())
    run = Run()
    for step, (inputs, targets) in enumerate(batches):
        size, index, total = len(targets), 0, torch.zeros(())
        sums: list[dict[str, torch.Tensor | None]] = []
        for share in range(shares):
            optimizer.zero_grad()
            for low in range(share * size // shares, (share + 1) * size // shares, microbatch):
                part = slice(low, low + microbatch)
                torch.manual_seed(harmony.microbatch_seed(step, index))
                index += 1
                loss = loss_fn(forward(net, inputs[part]), targets[part])
                (loss * (microbatch / size)).backward()
                total = total + loss.detach() * (microbatch / size)
            sums.append({n: p.grad for n, p in net.named_parameters()})
        for name, param in net.named_parameters():
            parts = [grads[name] for grads in sums if grads[name] is not None]
            param.grad = parts[0] if parts else None
            for other in parts[1:]:
                param.grad.add_(other)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        run.gradients.append(gradients_of(net))
        optimizer.step()
        run.losses.append(total)
    run.params = params_of(net)
    return run


def train_plain(net: nn.Module, *args: Any, **options: Any) -> Run:
    """Train a copy with casts written out."""
    return train(copy.deepcopy(net), *args, **options)


def train_fsdp(net: nn.Module, *args: Any, **options: Any) -> Run:
    """Train a copy by FSDP2 on the CPU, the only rank of a gloo group."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net = copy.deepcopy(net)
    with one_process():
        mesh = dist.init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
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
