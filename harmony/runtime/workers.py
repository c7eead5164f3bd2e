"""The host threads of the runtime: one a device and one for the updates, kept between steps."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

Job = tuple[Callable[[], None], Callable[[], None]]
"""What to run, and what to call when nothing of it is left."""

_LOOK_UP_S = 0.1


class Worker:
    """A daemon thread that runs one job at a time."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._jobs.put, None)

    def submit(self, job: Callable[[], None], done: Callable[[], None]) -> None:
        """Run ``job`` on the thread, which must not raise; then let go of it and call ``done``."""
        self._jobs.put((job, done))


class Countdown:
    """Lets one thread wait until several jobs are done, and hear signals meanwhile."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._done: list[None] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def done(self) -> None:
        """One job is done."""
        self._done.append(None)
        self._wake.put(None)

    def wait(self) -> None:
        """Wait until all are done.

        It looks up now and then: Python calls the handler of a signal between two of its own
        operations, and a signal that another thread was given, or made, wakes nobody who waits.
        """
        while len(self._done) < self._count:
            with suppress(queue.Empty):
                self._wake.get(timeout=_LOOK_UP_S)


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (pair := jobs.get()) is not None:
        job, done = pair
        try:
            job()
        finally:
            del job, pair  # it holds the step's tensors, which whoever waits may want to be gone
            done()
