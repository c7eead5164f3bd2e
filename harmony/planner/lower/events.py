"""Adds the events: one for every ordering that streams alone do not enforce, and no other.

Two steps that touch the same memory, one of them writing, must run in the order of the list. If
they are on the same stream they do. Otherwise the later one waits for an event of the earlier
one, unless something it already waits for, directly or not, came after that: vector clocks over
the streams tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from harmony.planner.ir.schedule import Instruction, Op
from harmony.planner.lower.steps import HOST_PROGRAM, PlacedInstruction

Clock = list[int]


class _Orderer:
    """Walks the steps and finds for each which earlier ones it must wait for."""

    def __init__(self, steps: Sequence[PlacedInstruction]) -> None:
        self.steps = steps
        names = sorted({(step.program, step.instruction.stream) for step in steps})
        number = {name: index for index, name in enumerate(names)}
        self.stream = [number[step.program, step.instruction.stream] for step in steps]
        # Per stream: for each stream, how many of its steps are known to be over.
        self.clocks: list[Clock] = [[0] * len(names) for _ in names]
        self.finished: list[Clock] = []
        self.ticks: list[int] = []
        self.writer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = defaultdict(list)

    def waits(self) -> list[list[int]]:
        """Return per step the steps whose events it waits for."""
        return [self._order(index) for index in range(len(self.steps))]

    def _order(self, index: int) -> list[int]:
        stream = self.stream[index]
        clock = self.clocks[stream].copy()
        needed = []
        # Latest first: the clock of a late step often implies the early ones.
        for before in sorted(self._conflicts(index), reverse=True):
            if self.ticks[before] > clock[self.stream[before]]:
                needed.append(before)
                known = self.finished[before]
                clock = [a if a > b else b for a, b in zip(clock, known, strict=True)]
        clock[stream] += 1
        self.ticks.append(clock[stream])
        self.finished.append(clock)
        self.clocks[stream] = clock
        return needed[::-1]

    def _conflicts(self, index: int) -> Iterable[int]:
        step = self.steps[index]
        found: set[int] = set()
        for cell in step.reads:
            if cell in self.writer:
                found.add(self.writer[cell])
            self.readers[cell].append(index)
        for cell in step.writes:
            found.update(self.readers.pop(cell, ()))
            if cell in self.writer:
                found.add(self.writer[cell])
            self.writer[cell] = index
        found.discard(index)
        return found


def add_events(steps: Sequence[PlacedInstruction], num_devices: int) -> list[list[Instruction]]:
    """Return the programs of the devices, and of the host last, with Records and Waits."""
    waits = _Orderer(steps).waits()
    awaited = sorted({before for needed in waits for before in needed})
    event = {index: number for number, index in enumerate(awaited)}
    programs: dict[int, list[Instruction]] = defaultdict(list)
    for (owner, instruction, _, _), (index, needed) in zip(steps, enumerate(waits), strict=True):
        program, stream = programs[owner], instruction.stream
        for before in needed:
            program.append(Instruction(stream, Op.WAIT, event=event[before]))
        program.append(instruction)
        if index in event:
            program.append(Instruction(stream, Op.RECORD, event=event[index]))
    return [programs[index] for index in (*range(num_devices), HOST_PROGRAM)]
