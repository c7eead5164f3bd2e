"""The updates that a step has left to the next one."""

from __future__ import annotations

from collections.abc import Iterable

from harmony.planner.ir.tasks import Pack
from harmony.runtime.host.host_state import HostState
from harmony.runtime.unsaved import about_to_change


class LateUpdates:
    """Of one step: the packs that are still to be updated, and with what the optimizer had then.

    Attributes:
        host: where their parameters and gradients are.
        packs: those still to be updated, in the order in which the next step needs them.
    """

    def __init__(self, host: HostState, packs: Iterable[Pack]) -> None:
        """Leave these packs, whose gradients are complete, with the optimizer's options of now."""
        assert host.optimizer is not None, "a step without an optimizer has no updates"
        self.host = host
        self.packs = list(packs)
        self._options = host.optimizer.options()

    def update(self, pack: Pack) -> None:
        """Update one of them. It is no longer one of them, whether that fails or not."""
        self.packs.remove(pack)
        self.host.update_late(pack, self._options)

    def finish(self) -> None:
        """Update all that are left; a checkpoint that is written has the old values first."""
        while self.packs:
            names = self.host.updated_by(self.packs[0])
            about_to_change(self.host.params[name] for name in names)
            self.update(self.packs[0])
