"""Tells whether two recordings compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from harmony.capture.graph.trace import Constant, Step, TraceValue
from harmony.capture.replay.replay import equal

Recorded = tuple[Sequence[Step], Sequence[TraceValue]]

_COMPARED = (
    *("kind", "name", "target", "structure", "context", "outputs", "mutated"),
    *("left_behind", "state", "changes", "counts", "random"),
)


def same_steps(first: Recorded, second: Recorded) -> bool:
    """Whether two recordings, steps and values, compute the same from inputs and parameters."""
    (steps, values), (other_steps, other_values) = first, second
    return (
        len(steps) == len(other_steps)
        and list(map(_form, values)) == list(map(_form, other_values))
        and all(map(_same_step, steps, other_steps))
    )


def _form(value: TraceValue) -> tuple[Any, ...]:
    return value.shape, value.stride, value.dtype, value.requires_grad, value.storage


def _same_step(one: Step, two: Step) -> bool:
    if any(getattr(one, field) != getattr(two, field) for field in _COMPARED):
        return False
    if not _same_leaf(one.expected, two.expected) or not _same_start(one, two):
        return False
    return len(one.leaves) == len(two.leaves) and all(map(_same_leaf, one.leaves, two.leaves))


def _same_start(one: Step, two: Step) -> bool:
    first, second = one.python_random, two.python_random
    if first is None or second is None:
        return first is second
    return first.same(second)


def _same_leaf(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, Constant) and isinstance(two, Constant):
        return torch.equal(one.tensor.cpu(), two.tensor.cpu())
    return type(one) is type(two) and equal(one, two)
