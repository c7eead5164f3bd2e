"""Standard output and error as they may be: closed, full, or without a reader."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TextIO


class ClosedStream(io.TextIOBase):
    """Stands for a standard stream that was closed before the program began.

    Python has None there: what a script prints vanishes, and nothing else can be written.

    Attributes:
        lost: whether anything was written to it.
    """

    encoding = "utf-8"
    lost = False

    def write(self, text: str) -> int:
        """Take a text and forget it."""
        self.lost = self.lost or bool(text)
        return len(text)


def open_streams() -> None:
    """Put streams where the caller has closed them."""
    if sys.stdout is None:
        sys.stdout = ClosedStream()
    if sys.stderr is None:
        sys.stderr = ClosedStream()


def flush_output() -> None:
    """Write out what was printed to standard output.

    Raises:
        OSError: if some of it is lost.
    """
    sys.stdout.flush()
    if isinstance(sys.stdout, ClosedStream) and sys.stdout.lost:
        raise OSError(errno.EBADF, "standard output is closed")


def stop_writing(stream: TextIO) -> None:
    """Send what is still in a stream nowhere: Python would complain once more when it exits."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor needs nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
