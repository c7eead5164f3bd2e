"""The replay state of a layer: random numbers and buffers that its recompute must find."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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
