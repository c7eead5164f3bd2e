"""A reentrant lock that the race checker knows of."""

from __future__ import annotations

import threading
from types import TracebackType

from harmony.runtime import native


class TracedLock:
    """A reentrant lock: what a thread does in its turn is ordered after the turns before it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        (self._token,) = native.new_tokens(1)

    def acquire(self, timeout_s: float = -1) -> bool:
        """Begin a turn; return whether it came within so many seconds, -1 for any number."""
        if not self._lock.acquire(timeout=timeout_s):
            return False
        native.trace_acquire(self._token)
        return True

    def release(self) -> None:
        """End a turn."""
        native.trace_release(self._token)
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
