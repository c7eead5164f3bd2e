"""The host's program: gradients added, parameters updated, on a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from harmony.planner.schedule import HOST, Instruction, Op
from harmony.planner.tasks import TaskKind
from harmony.runtime import native
from harmony.runtime.hoststate import HostState
from harmony.runtime.step import Step
from harmony.timeline import Span


class HostProgram:
    """Issues the instructions of the host; `issue` runs on the update thread."""

    name = HOST

    def __init__(
        self,
        program: Sequence[Instruction],
        host: HostState,
        events: Mapping[int, torch.Event],
        kinds: Sequence[str],
    ) -> None:
        self._program = program
        self._host = host
        self._events = events
        self._kinds = kinds

    def issue(self, step: Step) -> None:
        """Run the whole program."""
        late: list[tuple[int, Instruction]] = []
        for index, instruction in enumerate(self._program):
            step.signals.check()
            if _is_update(instruction) and step.holds_updates:
                late += [(index, instruction)] if step.apply_updates else []
                continue
            step.running[self.name] = str(instruction)
            if instruction.op is Op.WAIT:
                self._wait(instruction, step)
            elif instruction.op is Op.RECORD:
                assert instruction.event is not None
                step.signals.issue(instruction.event)
            elif instruction.op is Op.RUN:
                self._timed(index, instruction, step)
        for event in step.before_updates:
            step.signals.wait(event)
        if step.check is not None:
            step.running[self.name] = "the self-check"
            step.check.compare()
        if late and step.clips:
            self._clip(step)
        step.signals.issue(step.approval)
        for index, instruction in late:
            self._timed(index, instruction, step)

    def _timed(self, index: int, instruction: Instruction, step: Step) -> None:
        start_s = step.now_s()
        self._run(instruction)
        lane = f"{HOST}.{instruction.stream}"
        span = Span(
            lane, str(instruction), self._kinds[index], start_s, step.now_s(), 0, index
        )
        step.spans.append(span)

    def _clip(self, step: Step) -> None:
        """Clip the gradients, which are all complete, before the first update."""
        step.running[self.name] = "the clipping of the gradients"
        optimizer = self._host.optimizer
        assert optimizer is not None, "a step without an optimizer has no updates"
        self._host.publish_all()
        for param in self._host.params.values():
            if param.grad is not None:
                native.trace_host_access("clip", param.grad, write=True)
        optimizer.clip(self._host.params.values())

    def _wait(self, instruction: Instruction, step: Step) -> None:
        assert instruction.event is not None
        step.signals.wait(instruction.event)
        awaited = self._events.get(instruction.event)
        if awaited is not None:
            awaited.synchronize()

    def _run(self, instruction: Instruction) -> None:
        task = instruction.task
        assert task is not None
        for ref in instruction.reads:
            if ref.is_gradient_part and ref.part == 0:
                self._host.settle(ref)
        if task.kind is TaskKind.ACCUMULATE:
            assert task.addend is not None
            self._host.accumulate(task.addend)
        else:
            self._host.update(task.pack)


def _is_update(instruction: Instruction) -> bool:
    return instruction.task is not None and instruction.task.kind is TaskKind.UPDATE
