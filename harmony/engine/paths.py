"""The paths of a forward at one key of calls: a variant for each, or none."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from harmony.capture import Captured, DynamicOnlyError, same_path
from harmony.engine.call_key import CallKey
from harmony.engine.options import EngineOptions
from harmony.engine.planned import Planned
from harmony.engine.variant import Variant

K = TypeVar("K", bound=Hashable)

PathsKey = tuple[CallKey, bool]
"""What paths are kept by: the key of a call, and whether updates wait for the whole backward."""

MAX_PATHS = 8
"""Captures that are kept of one signature; the one used longest ago is forgotten first."""

MAX_SIGNATURES = 24
"""Signatures that a model keeps what they led to of: every length of a text has its own."""

MAX_CHANGES = 2
"""Captures that follow what has changed outside; from then on such a call runs as it is."""


@dataclass
class Paths:
    """What one signature has led to so far.

    Attributes:
        variants: of each path, the one used last first.
        dynamic: why no trace stands for later runs; None while one does.
        changes: how often something outside had changed that the forward reads, less how often
            nothing had.
        other_losses: how often something had changed that the loss reads.
        recorded: a recording that stands for nothing, but shows how its loss adds up.
    """

    variants: list[Variant] = field(default_factory=list)
    dynamic: DynamicOnlyError | None = None
    changes: int = 0
    other_losses: int = 0
    recorded: Captured | None = None

    def use(self, variant: Variant) -> None:
        """Put a variant, known or new, first."""
        others = [other for other in self.variants if other is not variant]
        self.variants = [variant, *others][:MAX_PATHS]

    def add(self, variant: Variant) -> None:
        """Put a new variant first.

        Where it computes what an earlier one does, it does not go by the tables that it finds, but
        sets up its own: then it stands whatever is in their places.
        """
        captured = variant.captured
        names = captured.trace.set_up.names
        if names and any(same_path(known.captured, captured) for known in self.variants):
            captured.guards = captured.guards.without(names)
        self.use(variant)

    def adds_up(self, variant: Variant, planned: Planned, options: EngineOptions) -> bool:
        """Whether it is still known how the losses of a plan's microbatches make the batch's.

        If not, the variant is forgotten, for a new one to be made. Where what the loss reads keeps
        changing, the batch is not parted any more, if the caller lets us choose.
        """
        reads = variant.captured.loss_reads
        if reads is None or len(planned.microbatches) < 2:
            return True
        changed = reads.changed()
        if changed is None:
            return True
        free = options.microbatch_size is None and options.mode != "dp" and options.plan is None
        if free and self.other_losses >= MAX_CHANGES:
            variant.forbid_parts(f"what the loss reads keeps changing ({changed})")
            return True
        self.other_losses += 1
        self.variants.remove(variant)
        variant.release()
        return False

    def standing(self, name: str) -> list[Variant]:
        """Return the variants for which all that was read outside is as it was.

        Args:
            name: of the model.

        Raises:
            DynamicOnlyError: if something has changed once more, after recordings that had
                followed it: naming it.
        """
        found = [variant for variant in self.variants if variant.captured.guards.same()]
        if found:
            self.changes = max(0, self.changes - 1)
        elif self.variants:
            self.changes += 1
            if self.changes > MAX_CHANGES:
                changed = self.variants[0].captured.guards.changed()
                raise DynamicOnlyError(
                    f"what the forward reads keeps changing: {changed}",
                    name,
                    eager=True,
                    passing=True,
                )
        return found


def use_last(known: dict[K, Paths], key: K) -> Paths:
    """Return what a signature has led to, and forget that of the one used longest ago.

    A forward that waits for its backward holds its variant itself.
    """
    found = known[key] = known.pop(key) if key in known else Paths()
    while len(known) > MAX_SIGNATURES:
        for variant in known.pop(next(iter(known))).variants:
            variant.release()
    return found
