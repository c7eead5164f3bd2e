"""The reference: plain PyTorch on the same stand-in or GPU, with the same kernels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import harmony

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


def train_plain(
    net: nn.Module,
    batches: Sequence[Batch],
    loss_fn: Loss,
    *,
    optimizer: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    microbatch: int,
    autocast: bool = False,
    updates: str = "host",
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a copy of ``net`` on ``cuda:0``; returns the losses and the state at the end.

    Args:
        updates: ``"host"``: the optimizer's steps are taken there, as Harmony's.
    """
    twin = copy.deepcopy(net).to("cuda:0")
    opt = optimizer(twin.parameters(), **options)
    losses = []
    for step, (x, y) in enumerate(batches):
        opt.zero_grad()
        total = torch.zeros(())
        count = len(x) // microbatch
        for index in range(count):
            rows = slice(index * microbatch, (index + 1) * microbatch)
            harmony.seed_microbatch(step, index)
            with amp() if autocast else contextlib.nullcontext():
                loss = loss_fn(twin(x[rows].to("cuda:0")), y[rows].to("cuda:0")) / count
            loss.backward()
            total += loss.detach().cpu()
        if updates == "host":
            twin.cpu()
        opt.step()
        twin.to("cuda:0")
        losses.append(float(total))
    return losses, {name: value.cpu() for name, value in twin.state_dict().items()}


def amp() -> torch.autocast:
    """Return what a script enters around its forward."""
    return torch.autocast("cuda", torch.bfloat16)


def assert_same(
    losses: Sequence[float],
    net: nn.Module,
    expected: tuple[Sequence[float], dict[str, torch.Tensor]],
) -> None:
    """Assert that losses and state are equal bit for bit."""
    assert list(losses) == list(expected[0])
    state = net.state_dict()
    assert state.keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(state[name], value), name
