"""What a step of the engine is made ready with, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from harmony.capture.guards.written import SetUp
from harmony.core.timeline import Timeline
from harmony.engine.planned import Planned
from harmony.engine.variant import Variant
from harmony.planner.ir.tasks import TaskKind
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.stage import Values
from harmony.runtime.step.layer_state import LayerStates
from harmony.runtime.step.randomness import RandomStreams, microbatch_seed
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
    """

    loss: torch.Tensor
    dtype: torch.dtype
    timeline: Timeline
    replay: ReplayState

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
    num_tokens: int | None
    timeline: Timeline | None


def count_tokens(call: Any) -> int | None:
    """Tokens of a batch, if its first tensor is one of token ids."""
    first = next((x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor)), None)
    if first is None or first.dim() != 2 or first.dtype not in (torch.int64, torch.int32):
        return None
    return first.numel()


def replay_state_of(
    net: nn.Module,
    ready: ReadyStep,
    context: DeviceContext,
    step: int,
    run_seed: int,
    recomputed: bool,
    first: int = 0,
) -> ReplayState:
    """Start the random stream of every microbatch of a step, and what layers change.

    Args:
        run_seed: the run's seed.
        recomputed: whether a backward will run the layers again.
        first: number of the first microbatch of this process among those of all.
    """
    captured, planned = ready.variant.captured, ready.planned
    spec = planned.plan.spec
    states = LayerStates(net, captured.changes, planned.forward_end, spec.minibatch, recomputed)
    if not planned.random_starts:
        return ReplayState(RandomStreams(frozenset()), states)
    random = RandomStreams(planned.random_starts, captured.draws_on_host)
    kind = TaskKind.FORWARD if spec.forward_packs else TaskKind.BACKWARD
    for index, samples in enumerate(planned.in_order[kind], first + ready.first_index):
        seed = microbatch_seed(step, index, run_seed)
        random.start(samples, 0, context.seeded_state(seed), seed)
    return ReplayState(random, states)
