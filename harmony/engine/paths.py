"""The paths of a forward at one key of calls: a variant for each, or none."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from harmony.capture import Batch, Captured, DynamicOnlyError, same_path
from harmony.capture.guards.written import SetUp
from harmony.engine.call_key import CallKey
from harmony.engine.options import EngineOptions
from harmony.engine.planned import Planned
from harmony.engine.step_result import ReadyStep
from harmony.engine.variant import Variant
from harmony.planner.ir.tasks import Samples
from harmony.runtime.step.step import Weights

K = TypeVar("K", bound=Hashable)

PathsKey = tuple[CallKey, bool]
"""What paths are kept by: the key of a call, and whether updates wait for the whole backward."""

MAX_PATHS = 8
"""Captures that are kept of one signature; the one used longest ago is forgotten first."""

MAX_SIGNATURES = 24
"""Signatures that a model keeps what they led to of: every length of a text has its own."""

MAX_CHANGES = 2
"""Captures that follow what has changed outside; from then on such a call runs as it is."""


@dataclass(frozen=True)
class Settled:
    """What runs for a key and a number of samples, where all but the guards is known beforehand.

    Attributes:
        fixed: how much the scalars of each microbatch count; None where that depends on the batch.
        set_up: what the forward sets up for later ones.
    """

    variant: Variant
    planned: Planned
    fixed: Weights | None
    set_up: SetUp

    def ready(self, batch: Batch) -> ReadyStep | None:
        """Say how a batch is run; None if its loss may not be that of its parts."""
        inputs, weights, doubt = self.variant.captured.inputs_of(batch), self.fixed, None
        if weights is None:
            weights, doubt = self.variant.weights(inputs, self.planned)
        if doubt is not None:
            return None
        return ReadyStep(self.variant, self.planned, inputs, weights, set_up=self.set_up)


@dataclass
class Paths:
    """What one signature has led to so far.

    Attributes:
        settled: by the number of samples, what runs while nothing changes.
        variants: of each path, the one used last first.
        dynamic: why no trace stands for later runs; None while one does.
        changes: how often something outside had changed that the forward reads, less how often
            nothing had.
        other_losses: how often something had changed that the loss reads.
        recorded: a recording that stands for nothing, but shows how its loss adds up.
    """

    settled: dict[int, Settled] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    dynamic: DynamicOnlyError | None = None
    changes: int = 0
    other_losses: int = 0
    recorded: Captured | None = None

    def next(self, minibatch: int, standing: Sequence[Variant]) -> Settled | None:
        """Return what is settled for this number of samples, if it still is what runs.

        Args:
            standing: the variants whose guards hold.
        """
        found = self.settled.get(minibatch)
        if found is None or not standing or self.variants[0] is not found.variant:
            return None
        same = standing[0] is found.variant and found.variant.settled(minibatch) is found.planned
        return found if same and _change_of_loss(found.variant, found.planned) is None else None

    def settle(self, found: ReadyStep, parts: Iterable[Samples]) -> None:
        """Keep what was found for a number of samples, if no batch of it can lead to another.

        Args:
            parts: of a batch, those that have to take the path of the variant.
        """
        captured, planned = found.variant.captured, found.planned
        if any(captured.looks_at_inputs(high - low) for low, high in parts):
            return
        is_whole = all(len(every) == 1 for every in planned.in_order.values())
        fixed = found.weights if is_whole else None
        settled = Settled(found.variant, planned, fixed, found.set_up)
        self.settled[planned.plan.minibatch] = settled

    def use(self, variant: Variant) -> None:
        """Put a variant, known or new, first."""
        others = [other for other in self.variants if other is not variant]
        self.variants = [variant, *others][:MAX_PATHS]
        kept = self.settled.items()
        self.settled = {size: found for size, found in kept if found.variant in self.variants}

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
        changed = _change_of_loss(variant, planned)
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


def _change_of_loss(variant: Variant, planned: Planned) -> str | None:
    """Name what the loss reads and has changed, where it is put together from microbatches'."""
    reads = variant.captured.loss_reads
    return None if reads is None or len(planned.microbatches) < 2 else reads.changed()


def use_last(known: dict[K, Paths], key: K) -> Paths:
    """Return what a signature has led to, and forget that of the one used longest ago.

    A forward that waits for its backward holds its variant itself.
    """
    found = known[key] = known.pop(key) if key in known else Paths()
    while len(known) > MAX_SIGNATURES:
        for variant in known.pop(next(iter(known))).variants:
            variant.release()
    return found
