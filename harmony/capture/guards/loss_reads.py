"""What the loss function reads, on which the rule rests that puts its microbatches together.

The function itself runs in every step. How its values add up was read off a recording and tried,
which another reduction, other class weights or another way through its code make untrue.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Collection
from types import CodeType
from typing import Any

import torch

from harmony.capture.guards.holders import Entry, Holder, Whole, listed
from harmony.capture.guards.observe import Observed, is_machinery
from harmony.capture.guards.reachable import World


class LossReads:
    """All that a loss function reads from outside, at one moment.

    Attributes:
        steered_by: name of what the loss writes itself and may be steered by: a counter, a moving
            average, anything where its code takes decisions; None for a log.
    """

    def __init__(self, world: World, observed: Observed, written: Collection[str]) -> None:
        """Remember a world.

        Args:
            observed: the Python that the loss has run.
            written: names of what it writes itself, such as logs and counters.
        """
        self._world = world
        self._written = frozenset(written)
        self._branches = any(map(_branches, observed.codes))
        own = [h for h in world.holders if h.name in self._written]
        steers = (h.name for h in own if self._branches or _is_number(h))
        self.steered_by: str | None = next(steers, None)

    def changed(self) -> str | None:
        """Name what has changed so that the rule may be another; None if nothing has.

        A weight may be another number, where the code takes no decisions: a factor is a factor.
        """
        if self._world.same():
            return None
        changed = (h for h in self._world.holders if h.name not in self._written and not h.same())
        return next((h.name for h in changed if self._branches or not _is_weight(h)), None)


def _is_number(holder: Holder) -> bool:
    """Whether a holder is of a number or a tensor: what is counted, or averaged."""
    numbers = (int, float, complex, torch.Tensor, type(None))
    return isinstance(holder, Entry) and isinstance(holder.expected, numbers)


def _is_weight(holder: Holder) -> bool:
    """Whether all that has changed are numbers, none of them from or to 0."""
    if isinstance(holder, Entry):
        return _are_weights(holder.expected, holder.found())
    if not isinstance(holder, Whole):
        return False
    now = listed(holder.container)
    same_length = len(now) == len(holder.held)
    return same_length and all(map(_are_weights, holder.held, now))


def _are_weights(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if type(before) is not float or type(now) is not float:
        return type(before) is type(now) and isinstance(now, (str, int)) and before == now
    return before == now or all(x != 0.0 and math.isfinite(x) for x in (before, now))


def _branches(code: CodeType) -> bool:
    """Whether a function of the user's or of a library takes a decision."""
    if is_machinery(code):
        return False
    return any(step.opname.startswith("POP_JUMP") for step in dis.get_instructions(code))
