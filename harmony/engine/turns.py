"""Calls of all models of a process take turns.

Random generators, the functions of PyTorch's that a recording stands in for, and the GPUs are
there once: what one model seeds, another would draw from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from harmony.core.warn import warn
from harmony.runtime.exec.workers import is_worker
from harmony.runtime.traced_lock import TracedLock

_SAID_AFTER_S = 60.0

_turn = TracedLock()


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the block while no other thread is in one.

    A thread may come in again: a model may hold another. So may what a call lets run on threads
    of its own, such as a loss that asks a teacher: the call waits for it.
    """
    if is_worker():
        yield
        return
    if not _turn.acquire(_SAID_AFTER_S):
        warn(
            f"{threading.current_thread().name} waits for another thread's call of a Harmony "
            "model: one runs at a time in a process. If that call waits for this thread, it "
            "waits for ever: call the model in the thread that called the other"
        )
        _turn.acquire()
    try:
        yield
    finally:
        _turn.release()
