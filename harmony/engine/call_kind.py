"""What kind of call the user makes."""

from __future__ import annotations

from enum import Enum

from harmony.planner.ir.tasks import Phase


class CallKind(Enum):
    """Who runs the loss, the backward and the optimizer."""

    TRAIN_STEP = "train_step"
    """`Harmony.train_step`: all of them are Harmony's."""

    OWN_LOOP = "own loop"
    """The module is called, with or without gradients; the rest is the user's own loop."""

    @property
    def phase(self) -> Phase:
        """What is planned for such a call."""
        return Phase.TRAIN if self is CallKind.TRAIN_STEP else Phase.BACKWARD
