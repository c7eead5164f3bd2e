"""The watchdog: says where a step stands in which nothing moves any more."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harmony.core.files import PACKAGE
from harmony.core.options import Watch
from harmony.core.units import format_seconds
from harmony.planner.ir.schedule import HOST, Instruction, Schedule
from harmony.runtime.exec.device_program import DeviceProgram
from harmony.runtime.step.step import Step

EXIT_STUCK = 124
"""As of ``timeout``: the process was ended because it took too long."""

LOOKS = 10
"""How often it looks within the time that it allows: each look asks every event of the step."""

AROUND = 3
"""Instructions of a program that are shown before and behind those where it stands."""


@dataclass(frozen=True)
class Watching:
    """What an executor is to watch for.

    Attributes:
        watch: how long, and what then.
        say: shows a text to the user.
    """

    watch: Watch
    say: Callable[[str], None]


class Watchdog:
    """Of one step: `look` is called again and again by the thread that waits for it.

    Whatever begins or ends is a movement: an instruction that a thread issues, one on a stream, an
    update on the host. A step that stands still is reported once, until it moves again.
    """

    def __init__(
        self,
        watching: Watching,
        schedule: Schedule,
        programs: Sequence[DeviceProgram],
        step: Step,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watch, self._say = watching.watch, watching.say
        self._schedule = schedule
        self._programs = programs
        self._step = step
        self._clock = clock
        self._place: object = None
        self._since_s = self._looked_s = clock()
        self._said = False

    def look(self) -> None:
        """Report, and end the process if that is asked for, if nothing has moved for long."""
        now_s = self._clock()
        if now_s - self._looked_s < self._watch.seconds / LOOKS:
            return
        self._looked_s = now_s
        place = self._where()
        if place != self._place:
            self._place, self._since_s, self._said = place, now_s, False
        if self._said or now_s - self._since_s < self._watch.seconds:
            return
        self._said = True
        self._say(self._report(now_s - self._since_s))
        if self._watch.ends:
            _end_process()

    def _where(self) -> object:
        devices = [(program.issuing, program.positions()) for program in self._programs]
        host = self._step.running.get(HOST), len(self._step.spans), len(self._step.finished)
        return devices, host

    def _report(self, seconds: float) -> str:
        then = "the process ends (exit code 124)" if self._watch.ends else "it goes on waiting"
        lines = [f"watchdog: nothing has moved in this step for {format_seconds(seconds)}; {then}"]
        for program, instructions in zip(self._programs, self._schedule.programs, strict=True):
            lines += self._thread(program.name)
            positions = program.positions()
            for stream, (index, begun) in positions.items():
                verb = "is at" if begun else "has not begun"
                lines.append(f"  {program.name} {stream} stream {verb} {instructions[index]}")
            at = {program.issuing, *(index for index, _ in positions.values())}
            lines += _lines_around(program.name, instructions, at)
        lines += self._thread(HOST)
        now = self._step.running.get(HOST)
        at = {i for i, instruction in enumerate(self._schedule.host) if str(instruction) == now}
        return "\n".join([*lines, *_lines_around(HOST, self._schedule.host, at)])

    def _thread(self, name: str) -> Iterator[str]:
        """Which instruction a thread issues, and where in the code it is."""
        if name in self._step.finished:
            yield f"  {name} thread is done"
            return
        frame = sys._current_frames().get(self._step.threads.get(name, 0))
        stack = [] if frame is None else traceback.extract_stack(frame)
        theirs = [s for s in stack if not s.filename.startswith(_OTHERS)]
        place = "".join(f", in {s.name} ({s.filename}:{s.lineno})" for s in theirs[-1:])
        yield f"  {name} thread is at {self._step.running.get(name, 'its beginning')}{place}"


_OTHERS = (str(PACKAGE), "<", *(sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")))
"""Where code is that is not the user's: Harmony's, Python's, and that of other libraries."""


def _lines_around(name: str, program: Sequence[Instruction], at: set[int]) -> Iterator[str]:
    """The lines of a program around some of them, which are marked."""
    marked = {index for index in at if index < len(program)}
    shown = sorted({i for m in marked for i in range(m - AROUND, m + AROUND + 1)})
    before = None
    for index in (i for i in shown if 0 <= i < len(program)):
        if before is None:
            yield f"  program {name}"
        elif index != before + 1:
            yield "      ..."
        before = index
        mark = ">" if index in marked else " "
        yield f"    {mark} {program[index].stream:<7} {program[index]}"


def _end_process() -> None:
    """End at once: no thread that is stuck in a driver can be waited for."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(EXIT_STUCK)
