"""The order in which threads can issue a schedule's instructions, and excerpts for errors.

A thread issues its program from top to bottom. A Wait holds the thread until the event's Record
has been issued; on the device the stream then waits for what was recorded. If some order issues
everything, then in that order every Record comes before its Waits, and so no stream can wait
for itself either.
"""

from __future__ import annotations

from typing import NamedTuple

from harmony.errors import ScheduleError
from harmony.planner.ir.schedule import HOST, Op, Schedule

_CONTEXT = 3


class Position(NamedTuple):
    """Where an instruction stands: its program, ``num_devices`` for the host, and position."""

    program: int
    index: int  # type: ignore[assignment]  # tuple.index, deliberately shadowed


def refuse(schedule: Schedule, at: Position, why: str) -> ScheduleError:
    """An error that shows the lines around an instruction, the wrong one marked."""
    return ScheduleError(f"{why}\n{excerpt(schedule, at)}")


def excerpt(schedule: Schedule, at: Position) -> str:
    """The lines around an instruction, with ``>`` before it."""
    name, program = list(schedule.all_programs())[at.program]
    low, high = max(0, at.index - _CONTEXT), at.index + _CONTEXT + 1
    lines = [f"  program {name}, instruction {at.index}:"]
    for index, step in enumerate(program[low:high], low):
        mark = ">" if index == at.index else " "
        lines.append(f"  {mark} {step.stream:<7} {step}")
    return "\n".join(lines)


def issue_order(schedule: Schedule) -> list[Position]:
    """Return all instructions in an order in which the threads can issue them.

    Raises:
        ScheduleError: if an event is recorded twice or never, or if the threads wait for each
            other.
    """
    programs = [program for _, program in schedule.all_programs()]
    recorded: dict[int, Position] = {}
    for number, program in enumerate(programs):
        for index, step in enumerate(program):
            if step.op is Op.RECORD and step.event is not None:
                at = Position(number, index)
                if step.event in recorded:
                    raise refuse(schedule, at, f"event e{step.event} is recorded twice")
                recorded[step.event] = at
    return _issue(schedule, recorded)


def _issue(schedule: Schedule, recorded: dict[int, Position]) -> list[Position]:
    programs = [program for _, program in schedule.all_programs()]
    next_at = [0] * len(programs)
    order: list[Position] = []
    issued: set[int] = set()
    # Programs that can go on; one that meets an event not yet recorded sleeps until it is.
    ready = list(range(len(programs)))[::-1]
    asleep: dict[int, list[int]] = {}
    while ready:
        number = ready.pop()
        program = programs[number]
        for index in range(next_at[number], len(program)):
            step = program[index]
            if step.event is not None:
                if step.op is Op.WAIT and step.event not in issued:
                    if step.event not in recorded:
                        why = f"event e{step.event} is never recorded"
                        raise refuse(schedule, Position(number, index), why)
                    asleep.setdefault(step.event, []).append(number)
                    next_at[number] = index
                    break
                if step.op is Op.RECORD:
                    issued.add(step.event)
                    ready.extend(reversed(asleep.pop(step.event, [])))
            order.append(Position(number, index))
        else:
            next_at[number] = len(program)
    stuck = [Position(n, next_at[n]) for n, p in enumerate(programs) if next_at[n] < len(p)]
    if stuck:
        shown = "\n".join(excerpt(schedule, at) for at in stuck)
        raise ScheduleError(f"deadlock: these programs wait for each other\n{shown}")
    return order


def program_name(schedule: Schedule, number: int) -> str:
    """``gpu0`` and so on, ``host`` for the last."""
    return HOST if number == schedule.num_devices else f"gpu{number}"
