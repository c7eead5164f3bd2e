"""Signals are heard between steps, never inside of one: Ctrl-C first of all.

A handler of Python's may raise anywhere in the main thread. In the middle of a step that would
leave threads at work that nobody waits for, or parameters of one step and buffers of another; in
a callback of a weak reference it would be printed and lost. So while a step runs, signals are
noted, and their handlers called when it is over.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]

Stop = Callable[[BaseException], object]
"""Called with what is to be raised, to end a step at once."""

_HELD = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""Whose handlers save, tidy up or raise. SIGINT is the last to be given back: it raises."""

_WATCHDOGS = (signal.SIGVTALRM, signal.SIGALRM)
"""Whose handlers are called at once, as they are there to end what takes too long."""


SAME_S = 0.2
"""Two signals within this time are one Ctrl-C: launchers pass on what a terminal has sent too."""


class Ending:
    """A handler of the signals that ask a process to end: it takes a note of the first.

    Who has asked for it looks at `came` when a step is over. A second signal does what it would
    have done without this handler. Signals that the process ignores stay ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came: signal.Signals | None = None
        self._came_s = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the place of the handlers, where this is the main thread."""
        if not _in_main_thread():
            return
        for number in self.SIGNALS:
            handler = signal.getsignal(number)
            if handler is signal.SIG_IGN or handler is None:  # None: not one of Python's
                continue
            if isinstance(handler, Ending):
                handler = handler._before.get(number, signal.SIG_DFL)
            self._before[number] = handler
            signal.signal(number, self)

    def close(self) -> None:
        """Put the handlers back that were there before."""
        if not _in_main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) is self:
                signal.signal(number, handler)
        self._before.clear()

    def raises(self, number: int) -> bool:
        """Whether a second signal of this number is a KeyboardInterrupt."""
        return self._before.get(number) is signal.default_int_handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take the note; do what would have been done, if it is not the first."""
        now_s = time.monotonic()
        if self.came is None:
            self.came, self._came_s = signal.Signals(number), now_s
        elif now_s - self._came_s > SAME_S:
            handler = self._before.get(number, signal.SIG_DFL)
            if callable(handler):
                handler(number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)


class Held:
    """The signals that have come while a block ran."""

    def __init__(self, handlers: dict[int, Handler]) -> None:
        self._handlers = handlers
        self._came: list[tuple[int, FrameType | None]] = []
        self._raised: BaseException | None = None
        self._stop: Stop | None = None
        self._may_raise = False
        self._first_s = math.inf

    @contextmanager
    def stopped_by(self, stop: Stop) -> Iterator[None]:
        """Let a second Ctrl-C call ``stop`` while the block runs."""
        before, self._stop = self._stop, stop
        try:
            yield
        finally:
            self._stop = before

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let a second Ctrl-C raise while the block runs, which changes nothing that lasts.

        The first one is heard when the block is over, or at a ``check``.
        """
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False
        self.check()

    def check(self) -> None:
        """Call the handlers of what has come so far; they may raise."""
        while self._came:
            number, frame = self._came.pop(0)
            self._handlers[number](number, frame)
        if self._raised is not None:
            error, self._raised = self._raised, None
            raise error

    def is_heard(self) -> None:
        """Note that a Ctrl-C leaves the block as the exception that it became."""
        self._came = [(number, frame) for number, frame in self._came if number != signal.SIGINT]

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take the place of the handler."""
        if number in _WATCHDOGS:
            try:
                self._handlers[number](number, frame)
            except BaseException as error:
                self._raised = error
                self._end(error)
            return
        self._came.append((number, frame))
        handler = self._handlers[number]
        patient = isinstance(handler, Ending) and handler.raises(number)
        if handler is signal.default_int_handler or patient:
            now_s = time.monotonic()
            if now_s - self._first_s > SAME_S:
                self._end(KeyboardInterrupt("Ctrl-C twice"))
            self._first_s = min(self._first_s, now_s)

    def _end(self, error: BaseException) -> None:
        if self._stop is not None:
            self._stop(error)
        elif self._may_raise:
            self._may_raise = False  # what tidies up behind it is not to be interrupted again
            self._raised = None
            self.is_heard()
            raise error


_held: list[Held] = []
"""Of the block that the main thread is in; empty outside of any."""


def check() -> None:
    """Hear what has come to the main thread; called where nothing is half done."""
    if _held and _held[-1]._may_raise and _in_main_thread():
        _held[-1].check()


@contextmanager
def held_back() -> Iterator[Held]:
    """Let the block end before the handlers of signals are called.

    Threads other than the main one hear nothing anyway, and a block in such a block leaves it to
    the outer one. Where a handler raises, that is what leaves the block; what the block itself
    has raised is its context.
    """
    if not _in_main_thread():
        yield Held({})
        return
    if _held:
        yield _held[-1]
        return
    found = {number: signal.getsignal(number) for number in (*_WATCHDOGS, *_HELD)}
    handlers: dict[int, Any] = {n: handler for n, handler in found.items() if callable(handler)}
    held = Held(handlers)
    note = held.note
    try:
        _install(dict.fromkeys(handlers, note))
        _held.append(held)
        yield held
    except KeyboardInterrupt:
        held.is_heard()
        raise
    finally:
        _held.clear()
        # One of the user's own that was set meanwhile stays.
        _install({n: h for n, h in handlers.items() if signal.getsignal(n) is note})
        held.check()


def _install(handlers: dict[int, Any]) -> None:
    """Set these handlers, all of them before any is called."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
