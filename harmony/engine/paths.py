"""What one signature of the inputs has led to: a capture for each path of the forward, or none."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from harmony.capture import Captured, LiveOnlyError
from harmony.engine.variant import Binding

K = TypeVar("K", bound=Hashable)

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
        bindings: of each path, the one used last first.
        live: why no tape stands for later runs; None while one does.
        changes: how often something outside had changed that the forward reads.
        recorded: a recording that stands for nothing, but shows how its loss adds up.
    """

    bindings: list[Binding] = field(default_factory=list)
    live: LiveOnlyError | None = None
    changes: int = 0
    recorded: Captured | None = None

    def use(self, binding: Binding) -> None:
        """Put a binding, known or new, first."""
        others = [other for other in self.bindings if other is not binding]
        self.bindings = [binding, *others][:MAX_PATHS]

    def standing(self, name: str) -> list[Binding]:
        """Return the bindings for which all that was read outside is as it was.

        Args:
            name: of the model.

        Raises:
            LiveOnlyError: if something has changed once more, after recordings that had followed
                it: naming it.
        """
        found = [binding for binding in self.bindings if binding.captured.guards.same()]
        if self.bindings and not found:
            self.changes += 1
            if self.changes > MAX_CHANGES:
                changed = self.bindings[0].captured.guards.changed()
                raise LiveOnlyError(
                    f"what the forward reads keeps changing: {changed}",
                    name,
                    as_is=True,
                    passing=True,
                )
        return found


def use_last(known: dict[K, Paths], key: K) -> Paths:
    """Return what a signature has led to, and forget that of the one used longest ago.

    A forward that waits for its backward holds its binding itself.
    """
    found = known[key] = known.pop(key) if key in known else Paths()
    while len(known) > MAX_SIGNATURES:
        for binding in known.pop(next(iter(known))).bindings:
            binding.release()
    return found
