"""The reference: plain PyTorch gradient accumulation over the same microbatches.

On the CPU, or on a GPU where tests run on real ones (`devices.reference`). Optimizers run on the
host, as Harmony's then do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

import harmony
from tests import devices

from .models import square_loss, token_batch, token_loss, vector_batch

SGD = {"lr": 0.05, "momentum": 0.9, "foreach": False}


@dataclass
class Run:
    """What a training run left: losses, gradients of the last step, parameters."""

    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    params: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def computing(net: nn.Module, device: torch.device | None = None) -> Iterator[torch.device]:
    """Let plain PyTorch compute on the reference's device; behind it all is on the host."""
    there = device or devices.reference()
    if there.type == "cpu":
        yield there
        return
    net.to(there)
    yield there
    net.cpu()


def moved(values: Any, device: torch.device) -> Any:
    """Return nested values with their tensors on a device; one tensor stays one."""
    there: dict[int, torch.Tensor] = {}

    def of(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return there.setdefault(id(x), x.to(device))

    return tree_map(of, values)


def gradients_of(net: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def params_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in net.named_parameters()}


def train_plain(
    net: nn.Module,
    batches: Sequence[tuple[Any, Any]],
    *,
    optimizer: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    loss_fn: Callable[[Any, Any], torch.Tensor],
    microbatch: int,
    shares: int = 1,
    seed: int = 0,
    max_norm: float | None = None,
) -> Run:
    """Train a copy of ``net``; with shares, add the partial sums of the shares in their order."""
    net = copy.deepcopy(net)
    trainable = [p for p in net.parameters() if p.requires_grad]
    opt = optimizer(trainable, **options)
    run = Run()
    for step, (inputs, targets) in enumerate(batches):
        total = torch.zeros(())
        partial: list[list[torch.Tensor | None]] = []
        index = 0
        size = len(inputs) // shares
        for share in range(shares):
            opt.zero_grad()
            end = len(inputs) if share == shares - 1 else (share + 1) * size
            with computing(net) as there:
                for low in range(share * size, end, microbatch):
                    high = min(low + microbatch, end)
                    torch.manual_seed(harmony.microbatch_seed(step, index, seed))
                    index += 1
                    weight = (high - low) / len(inputs)
                    part = moved((inputs[low:high], targets[low:high]), there)
                    loss = loss_fn(net(part[0]), part[1])
                    (loss * weight).backward()
                    total = total + loss.detach().cpu() * weight
            partial.append([p.grad for p in trainable])
        for i, param in enumerate(trainable):
            parts = [grads[i] for grads in partial if grads[i] is not None]
            param.grad = None
            for part in parts:
                param.grad = part if param.grad is None else param.grad.add_(part)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(trainable, max_norm)
        run.gradients.append(gradients_of(net))
        opt.step()
        run.losses.append(total)
    run.params = params_of(net)
    return run


def train_tokens(
    net: nn.Module,
    steps: int,
    optimizer: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    *,
    microbatch: int = 2,
    shares: int = 1,
    max_norm: float | None = None,
) -> Run:
    """The reference for a `GPT` on its token batches, from step 0 on."""
    return train_plain(
        net,
        [token_batch(step) for step in range(steps)],
        optimizer=optimizer,
        options=options,
        loss_fn=token_loss,
        microbatch=microbatch,
        shares=shares,
        max_norm=max_norm,
    )


def train_vectors(net: nn.Module, steps: int = 3, device: torch.device | None = None) -> list[Any]:
    """Train on `vector_batch`es in four microbatches of 2, on the reference's device or this."""
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        with computing(net, device) as there:
            inputs, targets = moved(vector_batch(step), there)
            for index in range(4):
                part = slice(2 * index, 2 * index + 2)
                harmony.seed_microbatch(step, index)
                loss = square_loss(net(inputs[part]), targets[part]) * 0.25
                loss.backward()
                total = total + loss.detach().cpu()
        seen.append((total, gradients_of(net)))
        optimizer.step()
    return seen
