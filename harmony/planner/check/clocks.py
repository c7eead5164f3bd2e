"""Vector clocks over the streams of a schedule: what is certainly over when something starts."""

from __future__ import annotations

from harmony.planner.ir.schedule import Instruction, Op

StreamName = tuple[int, str]


class Clocks:
    """Which instructions of which streams have ended before the current one starts.

    An instruction is a stream and a tick, its number on the stream. It has certainly ended when
    the clock of the current stream shows its tick, or a later one, for its stream.

    Attributes:
        now: stream and tick of the current instruction.
    """

    def __init__(self) -> None:
        self.number: dict[StreamName, int] = {}
        self.clocks: list[list[int]] = []
        self.events: dict[int, list[int]] = {}
        self.stream = 0
        self.now = (0, 0)

    def _select(self, program: int, stream: str) -> list[int]:
        name = (program, stream)
        if name not in self.number:
            self.number[name] = len(self.clocks)
            self.clocks.append([])
        self.stream = self.number[name]
        clock = self.clocks[self.stream]
        # Streams appear as the walk meets them; nothing is known of those not met yet.
        clock.extend([0] * (len(self.clocks) - len(clock)))
        return clock

    def event(self, program: int, step: Instruction) -> None:
        """Record an event, or take over what an event knows."""
        clock = self._select(program, step.stream)
        assert step.event is not None
        if step.op is Op.RECORD:
            self.events[step.event] = list(clock)
        else:
            known = self.events[step.event]
            both = zip(clock, known, strict=False)
            clock[: len(known)] = [a if a > b else b for a, b in both]

    def advance(self, program: int, step: Instruction) -> None:
        """Start an instruction: it becomes the current one."""
        clock = self._select(program, step.stream)
        clock[self.stream] += 1
        self.now = self.stream, clock[self.stream]

    def is_over(self, instruction: tuple[int, int]) -> bool:
        """Whether an earlier instruction has certainly ended when the current one starts."""
        stream, tick = instruction
        clock = self.clocks[self.stream]
        return stream < len(clock) and tick <= clock[stream]
