"""The events of a schedule: what records them, who waits for them, across threads or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.runtime.device import DeviceContext
from harmony.runtime.step.step import Step


@dataclass(frozen=True)
class Events:
    """All events of a schedule.

    Attributes:
        torch_events: of every event that a device records.
        crossing: events that another program waits for.
        count: one more than the highest number.
    """

    torch_events: Mapping[int, torch.Event]
    crossing: frozenset[int]
    count: int

    @staticmethod
    def of(schedule: Schedule, contexts: Sequence[DeviceContext]) -> Events:
        """Find who records and awaits what, and make the devices' events."""
        programs = [program for _, program in schedule.all_programs()]
        recorded_by = {
            step.event: index
            for index, program in enumerate(programs)
            for step in program
            if step.op is Op.RECORD and step.event is not None
        }
        events = {
            event: contexts[index].new_event()
            for event, index in recorded_by.items()
            if index < schedule.num_devices
        }
        crossing = frozenset(
            step.event
            for index, program in enumerate(programs)
            for step in program
            if step.op is Op.WAIT and step.event is not None and recorded_by[step.event] != index
        )
        return Events(events, crossing, max(recorded_by, default=-1) + 1)


class EventIssuer:
    """Looks up the events of one device's program, once; what it returns is issued every step."""

    def __init__(self, events: Events, context: DeviceContext) -> None:
        self._events = events
        self._context = context
        self._own: set[int] = set()

    def record(self, instruction: Instruction) -> Callable[[Step], None]:
        """Prepare a Record."""
        event = _event(instruction)
        recorded = self._events.torch_events[event]
        self._own.add(event)
        crossing = event in self._events.crossing
        stream = self._context.streams[instruction.stream]

        def issue(step: Step) -> None:
            stream.record_event(recorded)
            if crossing:
                step.signals.issue(event)

        return issue

    def wait(self, instruction: Instruction) -> Callable[[Step], None]:
        """Prepare a Wait."""
        event = _event(instruction)
        awaited = self._events.torch_events.get(event)  # None if the host records it
        stream = self._context.streams[instruction.stream]
        own = event in self._own

        def issue(step: Step) -> None:
            if not own:
                step.signals.wait(event)
            if awaited is not None:
                stream.wait_event(awaited)

        return issue


def _event(instruction: Instruction) -> int:
    assert instruction.event is not None
    return instruction.event
