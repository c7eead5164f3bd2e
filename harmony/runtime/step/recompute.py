"""What makes a recompute give what the forward gave: random numbers, buffers, the same kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmony.errors import ExecutionError
from harmony.runtime.step.layer_state import LayerStates
from harmony.runtime.step.randomness import RandomStreams


@dataclass(frozen=True)
class ReplayState:
    """Random states, and what layers change, of one forward and its backward."""

    random: RandomStreams
    states: LayerStates

    @staticmethod
    def nothing() -> ReplayState:
        """Return a replay of nothing, for runs that nothing depends on."""
        return ReplayState(RandomStreams(frozenset()), LayerStates(nn.Module(), {}, 0, 0, False))


@contextmanager
def as_recomputed() -> Iterator[None]:
    """Run a forward as one that a backward follows, without keeping anything for it.

    PyTorch has other kernels, with other last bits, where no gradient is recorded: attention with
    a learnt mask, transformer layers in eval mode, products of matrices that it folds. So
    ``no_grad`` would not do for a forward whose backward runs on what a recompute gives.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _nothing_was_saved)
    with torch.enable_grad(), hooks:
        yield


def _nothing_was_saved(_: Any) -> torch.Tensor:
    raise ExecutionError(
        "a layer runs a backward in its forward, by what no recording has seen: call "
        "torch.autograd.grad or torch.func there"
    )
