"""How the threads of a step wait for each other, and how one that fails stops the others."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from harmony.runtime import native


class Stopped(Exception):  # noqa: N818 - it is no error of its own: another thread has failed
    """Another thread of the step has failed; this one has nothing left to do."""


_alive: weakref.WeakSet[Signals] = weakref.WeakSet()


def stop_all(error: BaseException) -> None:
    """End all steps that run now with this exception."""
    for signals in list(_alive):
        signals.fail("", error)


class Signals:
    """Which events have been issued in this step.

    A stream can only wait for an event that its owner has already recorded. So a thread that
    needs an event of another thread waits here until that one has come to its Record.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        """Make the signals of a step; each event is published under the token of its number."""
        self._condition = threading.Condition()
        self._issued: set[int] = set()
        self._tokens = tokens
        self.failure: tuple[str, BaseException] | None = None
        _alive.add(self)

    def issue(self, event: int) -> None:
        """Say that an event has been recorded."""
        native.trace_release(self._tokens[event])
        with self._condition:
            self._issued.add(event)
            self._condition.notify_all()

    def wait(self, event: int) -> None:
        """Wait until an event has been recorded.

        Raises:
            Stopped: if a thread of the step has failed meanwhile.
        """
        with self._condition:
            while event not in self._issued and self.failure is None:
                self._condition.wait()
            if self.failure is not None:
                raise Stopped
        native.trace_acquire(self._tokens[event])

    def fail(self, where: str, error: BaseException) -> None:
        """Stop the step: every thread that waits, now or later, raises ``Stopped``."""
        with self._condition:
            if self.failure is None:
                self.failure = (where, error)
            self._condition.notify_all()

    def check(self) -> None:
        """Raise ``Stopped`` if a thread of the step has failed."""
        if self.failure is not None:
            raise Stopped
