"""The host's program: gradients added, parameters updated, on a thread of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from harmony.core.timeline import Span
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Instruction, Op
from harmony.planner.ir.tasks import Task, TaskKind, TensorRef
from harmony.runtime import native
from harmony.runtime.host.host_state import HostState
from harmony.runtime.peers.exchange import Exchange
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
        self._host = host
        self._events = events
        self._prepared = [
            _Prepared.of(index, instruction, kinds[index], host)
            for index, instruction in enumerate(program)
        ]
        self.late = tuple(p.task.pack for p in self._prepared if p.task is not None and p.is_late)

    def issue(self, step: Step) -> None:
        """Run the whole program."""
        held: list[_Prepared] = []
        holds = step.holds_updates
        for prepared in self._prepared:
            step.signals.check()
            if prepared.is_update and holds:
                if step.apply_updates:
                    self._hold(prepared, step.exchange)
                    held.append(prepared)
                continue
            if prepared.is_late and not prepared.is_left_to(step):
                continue
            step.running[self.name] = prepared.label
            if prepared.task is not None:
                self._timed(prepared, prepared.task, step)
            elif prepared.records:
                step.signals.issue(prepared.event)
            else:
                self._wait(prepared.event, step)
        for event in step.before_updates:
            step.signals.wait(event)
        if step.check is not None:
            step.running[self.name] = "the self-check"
            step.check.compare()
        if step.apply_updates and (self.late or (held and step.waits)):
            self._gather(step)
        step.approved()
        step.signals.issue(step.approval)
        optimizer = self._host.optimizer
        if optimizer is None or (step.waits and optimizer.skips):
            return
        if held and optimizer.together is not None:
            self._update_all(step)
            return
        exchange = step.exchange if step.apply_updates else None
        if exchange is not None and exchange.begin_updates():
            step.updated.append("parameters that other processes update")
        for prepared in held:
            assert prepared.task is not None, "it updates"
            self._timed(prepared, prepared.task, step)
            if exchange is not None:
                exchange.updated(prepared.names)
        if exchange is not None:
            self._update_unused(step)
            self._finish(step, exchange)
            optimizer.has_stepped()  # where other processes update all

    def _timed(self, prepared: _Prepared, task: Task, step: Step) -> None:
        label, host = prepared.label, self._host
        if prepared.is_update or prepared.is_late:
            # A checkpoint that is written has the old values first.
            step.running[self.name] = f"the checkpoint, before {label}"
            about_to_change((host.params[name] for name in prepared.names), step.signals.check)
            step.updated.append(prepared.task_label)  # one that fails may have changed some
        start_s = step.now_s()
        step.running[self.name] = label
        self._run(prepared, task, step)
        if prepared.is_late:
            step.updated.remove(prepared.task_label)  # now it is of one step with the others
        span = Span(prepared.lane, label, prepared.kind, start_s, step.now_s(), 0, prepared.index)
        step.spans.append(span)

    def _gather(self, step: Step) -> None:
        """Give all parameters their gradients, which are complete; measure them where asked to."""
        optimizer = self._host.optimizer
        assert optimizer is not None, "a step without an optimizer has no updates"
        if step.exchange is not None:
            step.running[self.name] = "the average of the gradients over processes"
            self._average(step, step.exchange)
        self._host.publish_all()
        step.running[self.name] = "the look at the gradients"
        exchange = step.exchange
        if exchange is None:
            step.approve()
        else:
            exchange.approve(step.approve)
        if optimizer.max_norm is not None or optimizer.scaling is not None:
            step.running[self.name] = "the clipping of the gradients"
            self._host.measure(None if exchange is None else exchange.share)
        if exchange is not None:
            step.running[self.name] = "the agreement of all processes"
            exchange.agree()

    def _average(self, step: Step, exchange: Exchange) -> None:
        """Wait until the gradients are those of all processes."""
        host = self._host
        host.settle_all()
        exchange.arrived(host.gradients_of(host.gradients.layout.places))
        host.averaged(exchange.mine(exchange.average(step.signals.check)))

    def _finish(self, step: Step, exchange: Exchange) -> None:
        """Wait for parameters that other processes update, and compute with these from now on."""
        step.running[self.name] = "the new values of parameters that other processes update"
        self._host.weights.arena.refresh(exchange.finish(step.signals.check))

    def _update_unused(self, step: Step) -> None:
        """Update what other processes have gradients of, and no layer of this forward uses."""
        host = self._host
        mine = {n for p in self._prepared if p.is_update or p.is_late for n in p.names}
        names = [n for n in host.gradients.layout.places if n not in mine and host.has_gradient(n)]
        if not names:
            return
        about_to_change((host.params[name] for name in names), step.signals.check)
        step.running[self.name] = "the update of parameters that other processes use"
        step.updated.append("parameters that other processes use")
        host.update_unused(names)

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

    def _wait(self, event: int, step: Step) -> None:
        step.signals.wait(event)
        awaited = self._events.get(event)
        if awaited is not None:
            awaited.synchronize()

    def _hold(self, update: _Prepared, exchange: Exchange | None) -> None:
        """Do of an update what need not wait for the others' gradients."""
        assert update.task is not None, "it updates"
        self._settle(update)
        self._take_norms(update, update.task, exchange)

    def _take_norms(self, prepared: _Prepared, task: Task, exchange: Exchange | None) -> None:
        """Take the norms of a pack's gradients; those of other processes are added first."""
        if exchange is None:
            self._host.take_norms(task.pack, prepared.names)
        else:
            exchange.arrived(self._host.gradients_of(prepared.names))

    def _settle(self, prepared: _Prepared) -> None:
        for ref in prepared.first_parts:
            self._host.settle(ref)

    def _run(self, prepared: _Prepared, task: Task, step: Step) -> None:
        if prepared.is_late:
            assert step.late is not None
            step.late.update(task.pack)
            self._host.forget_gradients_of(task.pack)
            return
        self._settle(prepared)
        if task.kind is TaskKind.ACCUMULATE:
            assert task.addend is not None
            self._host.accumulate(task.addend)
        elif task.kind is TaskKind.NORMS:
            self._take_norms(prepared, task, step.exchange)
        else:
            self._host.update(task.pack, prepared.names)


@dataclass(frozen=True)
class _Prepared:
    """An instruction of the host, with what follows from it.

    Attributes:
        label, task_label: its text, and its task's.
        event: of a Record or Wait.
        records: whether it is a Record.
        names: of the parameters that it updates, or takes the norms of.
        first_parts: gradients that it reads, as far as their first part lies in the arena.
    """

    index: int
    label: str
    lane: str
    kind: str
    task: Task | None
    task_label: str
    event: int
    records: bool
    is_update: bool
    is_late: bool
    names: tuple[str, ...]
    first_parts: tuple[TensorRef, ...]

    @staticmethod
    def of(index: int, instruction: Instruction, kind: str, host: HostState) -> _Prepared:
        """Prepare an instruction."""
        task = instruction.task
        is_update = task is not None and task.kind is TaskKind.UPDATE
        is_late = task is not None and task.kind is TaskKind.LATE_UPDATE
        adds = task is None or task.kind is TaskKind.ACCUMULATE
        return _Prepared(
            index,
            str(instruction),
            f"{HOST}.{instruction.stream}",
            kind,
            task,
            str(task),
            -1 if instruction.event is None else instruction.event,
            instruction.op is Op.RECORD,
            is_update,
            is_late,
            () if adds or task is None else tuple(host.updated_by(task.pack)),
            tuple(r for r in instruction.reads if r.is_gradient_part and r.part == 0),
        )

    def is_left_to(self, step: Step) -> bool:
        """Whether the step before has left this update to be made now."""
        late = step.late
        return late is not None and self.task is not None and self.task.pack in late.packs
