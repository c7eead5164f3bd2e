"""Updates that run into the next step: who makes them, and before what.

A step leaves them, complete in all but their being made. The next step makes each before the
forward of its pack. Whoever wants a parameter, a gradient or state of the optimizer before that
makes all of them first, so nobody ever sees anything stale.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from harmony.engine.wholeness import Wholeness
from harmony.planner.ir.tasks import Pack
from harmony.runtime.host.host_state import HostState
from harmony.runtime.host.late_updates import LateUpdates
from harmony.runtime.interrupts import held_back
from harmony.runtime.traced_lock import TracedLock
from harmony.runtime.unsaved import about_to_change, is_being_saved
from harmony.runtime.update.first_access import FirstAccess, why_unwatched
from harmony.runtime.update.optimizer import PackOptimizer


class Late:
    """What the last step of one model has left.

    Attributes:
        num_steps: steps that have made what the one before had left.
        why_not: why the last step that could have left something did not.
    """

    def __init__(
        self, whole: Wholeness, lock: TracedLock, optimizer: PackOptimizer | None
    ) -> None:
        self.num_steps = 0
        self.why_not: str | None = None
        self._whole = whole
        self._lock = lock
        self._optimizer = optimizer
        self._left: LateUpdates | None = None
        self._access = FirstAccess(self.flush)
        _every.add(self)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let the block be a step, which may take what was left, and leave something itself."""
        if self._left is not None:
            self._access.end_for_optimizer()
        try:
            yield
        finally:
            self._watch()

    def leave(self, host: HostState, packs: tuple[Pack, ...]) -> None:
        """Leave the updates of these packs, whose gradients are complete."""
        self._left = LateUpdates(host, packs) if packs else None
        if self._left is not None and self._optimizer is not None:
            self._optimizer.has_stepped()

    def take(self, host: HostState, packs: tuple[Pack, ...]) -> LateUpdates | None:
        """Return what was left, for a schedule that makes these updates first.

        What another schedule has left is made at once.
        """
        left = self._left
        if left is not None and packs and left.host is host and tuple(left.packs) == packs:
            self._access.end()
            self.num_steps += 1
            return left
        self._make()
        return None

    def flush(self) -> None:
        """Make all updates that were left."""
        self._whole.check_process()  # before the lock, which a thread may hold that is not here
        with held_back(), self._lock:
            self._make()

    def give_up(self) -> None:
        """Make what was left, if anything: the model goes, and its module stays."""
        if self._left is not None and not sys.is_finalizing():
            self.flush()

    def _make(self) -> None:
        left, self._left = self._left, None
        if left is None:  # nothing is watched either
            return
        self._access.end()
        try:
            left.finish()
        except BaseException as error:
            self._whole.tear(error)
            raise

    def _watch(self) -> None:
        """Watch what is left; where that is not possible, make it."""
        left, optimizer = self._left, self._optimizer
        if left is None or not left.packs:
            self._left = None
            return
        assert optimizer is not None, "a step without an optimizer leaves nothing"
        names = [name for pack in left.packs for name in left.host.updated_by(pack)]
        params = [param for name in names if (param := left.host.params[name]).grad is not None]
        saving = "a checkpoint is being written" if is_being_saved() else None
        self.why_not = optimizer.together or saving or why_unwatched(params, optimizer.full)
        if self.why_not is None:
            self._access.watch(params, optimizer.full)
        elif optimizer.together is None:
            self._make()
        else:
            self._make_together(left.host, optimizer)

    def _make_together(self, host: HostState, optimizer: PackOptimizer) -> None:
        """Take the one step of all, to which somebody listens who did not when it was planned."""
        self._left = None
        try:
            about_to_change(host.params.values())
            optimizer.update_all(host.params.values())
            host.weights.arena.refresh()
        except BaseException as error:
            self._whole.tear(error)
            raise


_every: weakref.WeakSet[Late] = weakref.WeakSet()


def _before_fork() -> None:
    """Leave nothing to a child process, which has no threads to make it."""
    for late in list(_every):
        if late._left is not None:
            late.flush()


os.register_at_fork(before=_before_fork)
