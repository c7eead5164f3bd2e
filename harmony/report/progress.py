"""Where a training is: a line for a terminal, a notebook or a log, with the time that is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from harmony.core.options import current_options
from harmony.core.units import format_bytes, format_seconds
from harmony.errors import ConfigError
from harmony.report.session import ModelRecord, Observer, StepStats

REDRAW_S = 0.1
"""Seconds between two drawings of a line that is drawn over."""

PLAIN_S = 30.0
"""Seconds between two lines of a log."""

_ERASE = "\r\x1b[2K"

_UNWRITABLE = (OSError, ValueError, AttributeError)
"""What a stream raises whose reader has gone, that is closed, or that is not there (None)."""


class Progress(Observer):
    """Shows each step where it can be drawn over, else now and then: ``model.add_observer(...)``.

    The line has the step, the loss, samples and tokens a second, the most memory in use on a GPU,
    how fast the step was beside what the plan expected, and, with ``total``, the time left. In a
    notebook it is an output of the cell that is replaced. `harmony-run` has such a line itself,
    which then only learns ``total``.

    Args:
        total: how many steps the run has, those before a resume included; None: not known.
        stream: where to write to; default: standard error, or the notebook.
        clock: seconds of a monotonic clock.

    Raises:
        ConfigError: if ``total`` is no positive number.
    """

    def __init__(
        self,
        total: int | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total is not None and (not isinstance(total, int) or total < 1):
            raise ConfigError(f"total={total!r}: how many steps the run has, at least 1, or None")
        self._total = total
        self._clock = clock
        self._cell = _Cell() if stream is None and _in_notebook() else None
        self._stream = sys.stderr if stream is None else stream
        self._live = self._cell is not None or _is_terminal(self._stream)
        self._pace = Pace(clock)
        self._shown_s = clock()

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Show the step, if it is time to show one."""
        record.total_steps = self._total
        if current_options().active:
            return
        self._pace.add(stats)
        now, last = self._clock(), stats.step + 1 == self._total
        if not last and now - self._shown_s < (REDRAW_S if self._live else PLAIN_S):
            return
        self._shown_s = now
        self._show(describe(record, stats, self._pace), last=last)

    def _show(self, text: str, *, last: bool) -> None:
        if self._cell is not None:
            self._cell.show(text)
            return
        line = f"{_ERASE}{text}" + "\n" * last if self._live else f"harmony: {text}\n"
        with contextlib.suppress(*_UNWRITABLE):  # training goes on without being watched
            self._stream.write(line)
            self._stream.flush()


class Pace:
    """How long the steps take, whatever lies between two of them included."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._now: tuple[int, float] | None = None
        self.began_s = clock()

    def add(self, stats: StepStats) -> None:
        """Note a step that has just ended."""
        self._now = stats.step, self._clock()
        self._first = self._first or self._now

    def elapsed_s(self) -> float:
        """Seconds since this began to look."""
        return self._clock() - self.began_s

    def left_s(self, total: int | None) -> float | None:
        """Seconds until ``total`` steps are done; None before two of them were seen."""
        if total is None or self._first is None or self._now is None:
            return None
        (first, then), (step, now) = self._first, self._now
        if step <= first or total <= step:
            return None
        return (total - step - 1) * (now - then) / (step - first)


def describe(record: ModelRecord, stats: StepStats, pace: Pace) -> str:
    """One line about a step: ``step 12/100  loss 2.345  38.2 samples/s  ...  0:07, 1:23 left``."""
    total = record.total_steps
    parts = [f"step {stats.step}" if total is None else f"step {stats.step + 1}/{total}"]
    if stats.loss is not None:
        parts.append(f"loss {stats.loss:.4g}")
    if stats.step_s > 0:
        parts.append(f"{stats.num_samples / stats.step_s:.3g} samples/s")
        if stats.num_tokens:
            parts.append(f"{stats.num_tokens / stats.step_s:.4g} tokens/s")
    parts.append(f"{format_seconds(stats.step_s)} a step")
    if record.plan is not None and stats.step_s > 0:
        parts.append(f"{record.plan.step_s / stats.step_s:.0%} of the plan's speed")
    if any(stats.timeline.peak_nbytes):
        parts.append(f"{format_bytes(max(stats.timeline.peak_nbytes))} of a GPU")
    left = pace.left_s(total)
    parts.append(_minutes(pace.elapsed_s()) + ("" if left is None else f", {_minutes(left)} left"))
    return "  ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Cell:
    """An output of a notebook's cell that is replaced by the next."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Show a line in the place of the one before."""
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

        shown = {"text/plain": text}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except _UNWRITABLE:
        return False


def _in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this, which shows more than text."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")
