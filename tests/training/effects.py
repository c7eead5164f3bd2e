"""The same loop, or the same steps, by Harmony and by plain PyTorch, and what both leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import harmony

Batches = list[tuple[Any, torch.Tensor]]


def train(
    module: nn.Module,
    net: nn.Module,
    batches: Batches,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    way: str,
) -> list[float]:
    """Train in place, ``way`` being ``step``, ``loop``, or ``plain``; return the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step, (x, y) in enumerate(batches):
        if way == "step":
            assert isinstance(module, harmony.Harmony)
            losses.append(float(module.train_step((x,), y)))
            continue
        if way == "plain":
            harmony.seed_microbatch(step, 0, 0)
        optimizer.zero_grad()
        loss = loss_fn(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def model_of(net: nn.Module, way: str, loss_fn: Any, **options: Any) -> harmony.Harmony:
    """A Harmony model for steps, or for a loop."""
    if way == "step":
        options |= {"optimizer": torch.optim.SGD, "optimizer_kwargs": {"lr": 0.1}}
        options |= {"loss_fn": loss_fn}
    return harmony.Harmony(net, seed=0, **options)


def both(
    net: nn.Module,
    batches: Batches,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    way: str,
    **options: Any,
) -> tuple[nn.Module, Batches]:
    """Train copies in both ways and compare losses, state and inputs; return Harmony's."""
    twin, theirs = copy.deepcopy(net), copy.deepcopy(batches)
    expected = train(twin, twin, theirs, loss_fn, "plain")
    model = model_of(net, way, loss_fn, **options)
    found = train(model, net, batches, loss_fn, way)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batches, theirs, rtol=0, atol=0)
    flags = [[p.requires_grad for p in module.parameters()] for module in (net, twin)]
    assert flags[0] == flags[1]
    return net, batches
