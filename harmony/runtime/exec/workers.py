"""The host threads of the runtime: one a device and one for the updates, kept between steps."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

from harmony.runtime.exec.signals import stop_all

Job = tuple[Callable[[], object], Callable[[], None]]
"""What to run, and what to call when nothing of it is left."""

_LOOK_UP_S = 0.1

_LAST_JOB_S = 10.0
"""An update of the user's own that takes longer than this is left alone at exit."""


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_here = threading.local()


class Worker:
    """A daemon thread that runs one job at a time."""

    def __init__(self, name: str, *, awaited: bool = True) -> None:
        """Start the thread.

        Args:
            awaited: whether the end of the program waits for its job.
        """
        if not _workers:
            # Each time, to come before what was registered first: the end of the virtual GPUs.
            atexit.unregister(_rest)
            atexit.register(_rest)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._jobs.put, None)
        if awaited:
            _workers.add(self)

    def submit(self, job: Callable[[], object], done: Callable[[], None]) -> None:
        """Run ``job`` on the thread, which must not raise; then let go of it and call ``done``."""
        self._jobs.put((job, done))

    def end(self) -> None:
        """Take no job any more."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the last job."""
        self._thread.join(timeout_s)


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

    def wait(self, look: Callable[[], None] | None = None) -> None:
        """Wait until all are done.

        Args:
            look: called about ten times a second meanwhile.

        It looks up now and then: Python calls the handler of a signal between two of its own
        operations, and a signal that another thread was given, or made, wakes nobody who waits.
        """
        while len(self._done) < self._count:
            with suppress(queue.Empty):
                self._wake.get(timeout=_LOOK_UP_S)
            if look is not None:
                look()


def _rest() -> None:
    """Stop the steps that other threads still run, and wait for the workers.

    Python cannot exit while a thread is in PyTorch: that one would be ended there, by abort.
    """
    workers = list(_workers)
    for worker in workers:
        worker.end()
    stop_all(SystemExit("the program ends"))
    for worker in workers:
        worker.join(_LAST_JOB_S)


def is_worker() -> bool:
    """Whether this thread is one of the runtime's, so that a call waits for what it runs."""
    return getattr(_here, "serves", False)


def _serve(jobs: queue.SimpleQueue[Job | None]) -> None:
    _here.serves = True
    while (pair := jobs.get()) is not None:
        job, done = pair
        try:
            job()
        finally:
            del job, pair  # it holds the step's tensors, which whoever waits may want to be gone
            done()
