"""The host's program: gradients added, parameters updated, on a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from harmony.core.timeline import Span
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Instruction, Op
from harmony.planner.ir.tasks import TaskKind
from harmony.runtime import native
from harmony.runtime.host.host_state import HostState
from harmony.runtime.step.step import Step
from harmony.runtime.unsaved import about_to_change

ALL_UPDATES = "U[all]"
"""The update of all packs at once, in errors and traces."""


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
        self.late = tuple(step.task.pack for step in program if _is_late(step) and step.task)

    def issue(self, step: Step) -> None:
        """Run the whole program."""
        held: list[tuple[int, Instruction]] = []
        for index, instruction in enumerate(self._program):
            step.signals.check()
            if _is_update(instruction) and step.holds_updates:
                if step.apply_updates:
                    self._hold(instruction)
                    held.append((index, instruction))
                continue
            if _is_late(instruction) and not _is_left(instruction, step):
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
        if step.apply_updates and (self.late or (held and step.waits)):
            self._gather(step)
        step.signals.issue(step.approval)
        optimizer = self._host.optimizer
        if held and optimizer is not None and optimizer.together is not None:
            self._update_all(step)
            return
        for index, instruction in held:
            self._timed(index, instruction, step)

    def _timed(self, index: int, instruction: Instruction, step: Step) -> None:
        if _is_update(instruction) or _is_late(instruction):
            self._may_change(instruction, step)
            step.updated.append(str(instruction.task))  # one that fails may have changed some
        start_s = step.now_s()
        step.running[self.name] = str(instruction)
        self._run(instruction, step)
        if _is_late(instruction):
            step.updated.remove(str(instruction.task))  # now it is of one step with the others
        lane = f"{HOST}.{instruction.stream}"
        span = Span(lane, str(instruction), self._kinds[index], start_s, step.now_s(), 0, index)
        step.spans.append(span)

    def _may_change(self, instruction: Instruction, step: Step) -> None:
        """Let a checkpoint that is written have the old values first."""
        assert instruction.task is not None
        step.running[self.name] = f"the checkpoint, before {instruction}"
        names = self._host.updated_by(instruction.task.pack)
        about_to_change((self._host.params[name] for name in names), step.signals.check)

    def _gather(self, step: Step) -> None:
        """Give all parameters their gradients, which are complete; measure them where asked to."""
        optimizer = self._host.optimizer
        assert optimizer is not None, "a step without an optimizer has no updates"
        self._host.publish_all()
        step.running[self.name] = "the look at the gradients"
        step.approve()
        if optimizer.max_norm is not None:
            step.running[self.name] = "the clipping of the gradients"
            self._host.measure()

    def _update_all(self, step: Step) -> None:
        """Update all parameters at once, as a loop of one's own does."""
        optimizer, params = self._host.optimizer, self._host.params.values()
        assert optimizer is not None, "a step without an optimizer has no updates"
        step.running[self.name] = f"the checkpoint, before {ALL_UPDATES}"
        about_to_change(params, step.signals.check)
        step.running[self.name] = ALL_UPDATES
        step.updated.append(ALL_UPDATES)  # from here on nobody knows which have changed
        for param in params:
            native.trace_host_access(ALL_UPDATES, param, write=True)
            if param.grad is not None:
                native.trace_host_access(ALL_UPDATES, param.grad, write=False)
        start_s = step.now_s()
        optimizer.update_all(params)
        self._host.weights.arena.refresh()
        lane = f"{HOST}.{HOST_STREAM}"
        step.spans.append(Span(lane, f"run {ALL_UPDATES}", "update", start_s, step.now_s(), 0, -1))

    def _wait(self, instruction: Instruction, step: Step) -> None:
        assert instruction.event is not None
        step.signals.wait(instruction.event)
        awaited = self._events.get(instruction.event)
        if awaited is not None:
            awaited.synchronize()

    def _hold(self, update: Instruction) -> None:
        """Do of an update what need not wait for the others' gradients."""
        assert update.task is not None
        self._settle(update)
        self._host.take_norms(update.task.pack)

    def _settle(self, instruction: Instruction) -> None:
        for ref in instruction.reads:
            if ref.is_gradient_part and ref.part == 0:
                self._host.settle(ref)

    def _run(self, instruction: Instruction, step: Step) -> None:
        task = instruction.task
        assert task is not None
        if task.kind is TaskKind.LATE_UPDATE:
            assert step.late is not None
            step.late.update(task.pack)
            self._host.forget_gradients_of(task.pack)
            return
        self._settle(instruction)
        if task.kind is TaskKind.ACCUMULATE:
            assert task.addend is not None
            self._host.accumulate(task.addend)
        elif task.kind is TaskKind.NORMS:
            self._host.take_norms(task.pack)
        else:
            self._host.update(task.pack)


def _is_late(instruction: Instruction) -> bool:
    return instruction.task is not None and instruction.task.kind is TaskKind.LATE_UPDATE


def _is_left(instruction: Instruction, step: Step) -> bool:
    """Whether the step before has left this update to be made now."""
    task = instruction.task
    return step.late is not None and task is not None and task.pack in step.late.packs


def _is_update(instruction: Instruction) -> bool:
    return instruction.task is not None and instruction.task.kind is TaskKind.UPDATE
