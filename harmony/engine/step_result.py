"""What a step of the engine is made ready with, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_iter

from harmony.capture.guards.written import SetUp
from harmony.core.timeline import Timeline
from harmony.engine.planned import Planned
from harmony.engine.variant import Variant
from harmony.runtime.exec.stage import Values
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.step.step import Weights


@dataclass(frozen=True)
class ReadyStep:
    """A batch, and how it will be trained on.

    Attributes:
        inputs: the tensors of the batch, by value.
        weights: how much the scalars of each microbatch count.
        first_index: number of its first microbatch within the step.
        moved: Python attributes that a dynamic forward has changed: module, attribute, value.
        set_up: what the forward sets up for later ones.
    """

    variant: Variant
    planned: Planned
    inputs: Values
    weights: Weights
    first_index: int = 0
    moved: tuple[tuple[str, str, Any], ...] = ()
    set_up: SetUp = field(default_factory=SetUp)


@dataclass(frozen=True)
class RanStep:
    """A step that has run, whose changes of buffers the model does not have yet.

    Attributes:
        loss: sum over the microbatches, in fp32 where their losses are narrower.
        dtype: of these losses.
        excess: how it broke the limit of device memory, if that was looked at; else "". None of a
            step with hooks, which says nothing of its plan.
    """

    loss: torch.Tensor
    dtype: torch.dtype
    timeline: Timeline
    replay: ReplayState
    excess: str | None = ""

    @property
    def returned(self) -> torch.Tensor:
        """The loss in its own type, as plain PyTorch returns it."""
        return self.loss.to(self.dtype)


@dataclass(frozen=True)
class StepResult:
    """What a training step gives back.

    Attributes:
        timeline: None for a step that ran as it is, without a plan.
    """

    loss: torch.Tensor
    num_samples: int
    timeline: Timeline | None


def count_tokens(call: Any) -> int | None:
    """Tokens of a batch, if its first tensor is one of token ids."""
    first = next((x for x in tree_iter(call) if isinstance(x, torch.Tensor)), None)
    if first is None or first.dim() != 2 or first.dtype not in (torch.int64, torch.int32):
        return None
    return first.numel()
