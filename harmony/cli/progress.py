"""Progress while a script trains: a line at the bottom of a terminal, rare plain lines elsewhere.

The script's own output goes first. The line is erased before anything the script prints and drawn
again by a later step, and never while the script has left a line unfinished, so that progress bars
of the script's own work too. (Rich's live display would reflow what the script prints, and send
its standard output to standard error.)
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from harmony.cli.streams import stop_writing
from harmony.core.units import format_seconds
from harmony.errors import printable
from harmony.report.progress import PLAIN_S, REDRAW_S, Pace, describe
from harmony.report.session import LOG, ModelRecord, Observer, StepStats

_ERASE = "\r\x1b[2K"


class Progress(Observer):
    """Observes a session and shows where it is.

    Args:
        stream: where to write, normally standard error.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.next_step = 0
        self._stream = stream
        self._clock = clock
        self._live = stream.isatty()
        self._console = Console(file=stream)
        self._lock = threading.RLock()
        self._drawn = False
        self._at_line_start = True
        self._last = clock()
        self._pace = Pace(clock)

    def planned(self, record: ModelRecord) -> None:
        """Say which plan was made."""
        plan = record.plan
        if plan is not None and not LOG.isEnabledFor(logging.INFO):  # which says the same
            self.say(f"{record.name}: planned, {format_seconds(plan.step_s)} a step expected")

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Show the step, if it is time to show one."""
        self.next_step = stats.step + 1
        self._pace.add(stats)
        now = self._clock()
        if now - self._last < (REDRAW_S if self._live else PLAIN_S):
            return
        self._last = now
        text = describe(record, stats, self._pace)
        if self._live:
            self._draw(text)
        else:
            self.say(text)

    def say(self, message: str) -> None:
        """Write a whole line of its own."""
        with self._lock:
            self.erase()
            start = "" if self._at_line_start else "\n"
            with self._tolerant():
                self._stream.write(f"{start}harmony: {printable(message)}\n")
                self._stream.flush()
            self._at_line_start = True

    def erase(self) -> None:
        """Take the line away, before something else is written."""
        with self._lock:
            if self._drawn:
                with self._tolerant():
                    self._stream.write(_ERASE)
                    self._stream.flush()
                self._drawn = False

    @contextmanager
    def around_output(self) -> Iterator[None]:
        """Let the script's prints and the line share the terminal while the block runs."""
        before = sys.stdout, sys.stderr
        if self._live:
            streams = (_Shared(s, self) if s.isatty() else s for s in before)
            sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            self.erase()
            sys.stdout, sys.stderr = before

    def before_write(self, text: str) -> None:
        """Make room for ``text``, which the script is about to print."""
        with self._lock:
            self.erase()
            if text:
                self._at_line_start = text.endswith("\n")

    def _draw(self, text: str) -> None:
        with self._lock:
            if not self._at_line_start:
                return
            width = self._console.size.width - 1
            line = Text(text, style="dim", overflow="ellipsis", no_wrap=True)
            line.truncate(max(width, 10), overflow="ellipsis")
            with self._tolerant():
                self._stream.write(_ERASE)
                self._console.print(line, end="", soft_wrap=True)
                self._stream.flush()
            self._drawn = True

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Write no more where nothing can be written: training goes on without being watched."""
        try:
            yield
        except (OSError, ValueError):
            stop_writing(self._stream)


class _Shared:
    """A text stream that asks the progress line to step aside before each write."""

    def __init__(self, stream: TextIO, progress: Progress) -> None:
        self._stream = stream
        self._progress = progress

    def write(self, text: str) -> int:
        self._progress.before_write(text)
        return self._stream.write(text)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
