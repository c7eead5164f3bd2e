"""The drop-in form: a forward whose outputs take part in the user's own autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harmony.binding import Binding
from harmony.planner.plan import Plan
from harmony.runtime.randomness import RandomStates
from harmony.runtime.stage import Values


@dataclass
class ForwardCall:
    """What a backward needs to know of its forward.

    Attributes:
        outputs: ids of the values that the forward returned.
        generation: number of the forward; the stash holds only the newest one's values.
    """

    run_backward: Callable[[ForwardCall, Sequence[torch.Tensor | None]], None]
    binding: Binding
    plan: Plan
    random: RandomStates
    outputs: tuple[int, ...]
    generation: int


class RunBackward(torch.autograd.Function):
    """Makes the outputs of a forward part of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, call: ForwardCall, *outputs: torch.Tensor) -> Any:
        """Hand the outputs through."""
        ctx.call = call
        values = call.binding.graph.values
        fixed = [
            t for v, t in zip(call.outputs, outputs, strict=True) if not values[v].requires_grad
        ]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Run the packs backward; the gradients of the parameters land in ``param.grad``."""
        ctx.call.run_backward(ctx.call, gradients)
        return (None, None, *(None for _ in gradients))


def attach(values: Values, call: ForwardCall) -> Values:
    """Return the outputs of a forward as tensors whose backward runs the packs."""
    anchor = torch.zeros((), requires_grad=True)
    outputs = RunBackward.apply(anchor, call, *values.values())  # type: ignore[no-untyped-call]
    return dict(zip(values, outputs, strict=True))
