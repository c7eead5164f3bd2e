"""Weights of microbatches that were captured each on its own, for one batch only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harmony.capture.eager.dynamic_trace import DynamicTrace
from harmony.capture.loss.weights import LiveWeights

NET = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([-100, -100, 1, -100, 2, 3, 0, -100])
BY_TARGETS = [0.0, 0.25, 0.5, 0.25]
BY_SAMPLES = [0.25] * 4


def weights_of(loss: Any, targets: torch.Tensor = TARGETS) -> tuple[list[float], str | None]:
    live = DynamicTrace(NET, torch.device("cpu"), loss=loss)
    found = LiveWeights(8)
    weights = []
    for low in range(0, 8, 2):
        args, part = (INPUTS[low : low + 2],), targets[low : low + 2]
        captured = live.capture(args, {}, part, lambda: None)
        assert captured.graph.loss is not None
        inputs = captured.flatten_inputs(args, {}, part)
        weights.append(found.weigh(captured, captured.graph.loss, inputs))
    return [weight * found.scale() for weight in weights], found.doubt


def decayed(logits: torch.Tensor, targets: torch.Tensor) -> Any:
    return F.cross_entropy(logits, targets) + sum((p**2).sum() for p in NET.parameters())


def stacked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack([logits.square().mean(), logits.abs().mean()]).sum()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (F.cross_entropy, BY_TARGETS),
        (lambda o, t: 0.3 * F.cross_entropy(o, t), BY_TARGETS),
        (decayed, BY_TARGETS),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), [1.0] * 4),
        (lambda o, t: o.square().mean(), BY_SAMPLES),
        (stacked, BY_SAMPLES),
    ],
)
def test_what_one_size_tells_is_used(loss: Any, expected: list[float]) -> None:
    assert weights_of(loss) == (expected, None)


def test_equal_counts_weigh_exactly_as_samples_do() -> None:
    targets = torch.tensor([-100, 1] * 4)
    assert weights_of(lambda o, t: 0.3 * F.cross_entropy(o, t), targets) == (BY_SAMPLES, None)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda o, t: F.cross_entropy(o, t, reduction="sum") / len(t), "what divides"),
        (lambda o, t: o[:, :3].mean(0).sum(), "may put samples together"),
        (lambda o, t: o.square().mean().sqrt(), "neither a sum nor a constant factor"),
        (lambda o, t: F.cross_entropy(o, t) + o.square().mean(), "differently"),
    ],
)
def test_what_it_does_not_tell_is_doubted(loss: Any, why: str) -> None:
    weights, doubt = weights_of(loss)
    assert doubt is not None and why in doubt
    assert weights[-1] == 0.25
