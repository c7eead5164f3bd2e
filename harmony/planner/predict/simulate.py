"""Predicts what a schedule does on a machine: a schedule and costs to a timeline.

The model of a device is the executor's: one thread issues the program from top to bottom, in no
time, and is held by a Wait whose event has not been recorded yet; each stream is a queue. The
host's thread does its work itself, so a Wait of its own holds it until what was recorded is over.
What copies, updates and virtual GPUs share, and how, is the machine's
(`harmony.planner.predict.flows`).

    start of an instruction = max(its stream is free, its thread issues it, what it waits for)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.timeline import Span, Timeline
from harmony.planner.ir.issue import issue_order
from harmony.planner.ir.kinds import span_kinds
from harmony.planner.ir.schedule import HOST_STREAM, Instruction, Op, Schedule
from harmony.planner.ir.tasks import TaskKind, TensorKind, TensorRef
from harmony.planner.predict.cost import (
    CostTable,
    backward_s,
    forward_s,
    products_s,
    update_s,
)
from harmony.planner.predict.flows import Activities, Model, Times
from harmony.planner.predict.links import Links, Path
from harmony.planner.predict.memory import Workspace, device_peak, host_nbytes
from harmony.planner.predict.stalls import stall_causes

__all__ = ["Simulation", "simulate", "stall_causes"]


def simulate(
    schedule: Schedule,
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    model: Model = "fair",
) -> Timeline:
    """Return the predicted timeline of one step (see `Simulation`)."""
    return Simulation(schedule, graph, costs, machine, model).timeline()


class Simulation:
    """What a step does and when; its seconds are known at once, its timeline when asked for.

    A search wants the seconds of many schedules, and the timeline of one.

    Attributes:
        step_s: predicted seconds of the step.
    """

    def __init__(
        self,
        schedule: Schedule,
        graph: LayerGraph,
        costs: CostTable,
        machine: Machine,
        model: Model = "fair",
    ) -> None:
        """Simulate a schedule.

        Args:
            model: how what is shared is divided; see `harmony.planner.predict.flows`.

        Raises:
            ScheduleError: if the schedule deadlocks.
        """
        self._schedule, self._graph, self._costs = schedule, graph, costs
        self._work = _Work(schedule, graph, costs, machine)
        self._times: Times = self._work.run(model)
        self.step_s = self._times.makespan_s

    def timeline(
        self, *, labels: bool = True, peak_nbytes: Sequence[int] | None = None
    ) -> Timeline:
        """Return the timeline.

        Args:
            labels: whether spans have one; for figures alone they need none.
            peak_nbytes: of the devices, where they are known.
        """
        schedule, graph, times = self._schedule, self._graph, self._times
        kinds = span_kinds(schedule, graph)
        programs = list(schedule.all_programs())
        spans = []
        for number, program, index in self._work.made:
            name, steps = programs[program]
            step = steps[index]
            nbytes = 0 if step.ref is None else self._work.nbytes(step.ref)
            spans.append(
                Span(
                    f"{name}.{step.stream}",
                    str(step) if labels else "",
                    kinds[name][index],
                    times.starts[number],
                    times.ends[number],
                    nbytes,
                    index,
                )
            )
        if peak_nbytes is None:
            workspace, devices = Workspace(graph, self._costs), range(schedule.num_devices)
            peak_nbytes = [device_peak(schedule, i, graph, workspace).nbytes for i in devices]
        return Timeline(
            spans=spans,
            step_s=self.step_s,
            peak_nbytes=list(peak_nbytes),
            host_nbytes=host_nbytes(schedule, graph),
        )


_MAX_WAITS = 3
"""More activities than this that an event stands for become one."""


@dataclass
class _Thread:
    """A program while it is issued.

    Attributes:
        next: its next instruction.
        held: the host's activity that its thread was held by last, -1 if by none.
        last: per stream, its last activity.
        waits: per stream, what the next activity waits for besides the last one.
        saw: per stream, what ``held`` was for the last one; later ones follow that anyway.
    """

    next: int = 0
    held: int = -1
    last: dict[str, int] = field(default_factory=dict)
    waits: dict[str, list[int]] = field(default_factory=dict)
    saw: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Event:
    """What has to be over for the event, and the host's activity before it was recorded."""

    over: tuple[int, ...]
    held: int


class _Work:
    """The activities of a schedule.

    Attributes:
        made: number, program and position of every activity that is a span.
    """

    def __init__(
        self, schedule: Schedule, graph: LayerGraph, costs: CostTable, machine: Machine
    ) -> None:
        self.schedule = schedule
        self.graph = graph
        self.costs = costs
        self.machine = machine
        self.links = Links(machine, schedule.num_devices)
        self.activities = Activities()
        self.made: list[tuple[int, int, int]] = []
        self._threads = [_Thread() for _ in range(schedule.num_devices + 1)]
        self._late: list[int] = []
        self._events: dict[int, _Event] = {}
        self._sizes: dict[tuple[object, ...], int] = {}
        self._seconds: dict[tuple[object, ...], float] = {}
        self._issue_all()

    def run(self, model: Model) -> Times:
        """When everything happens."""
        return self.activities.run(self.links.resources, model)

    def nbytes(self, ref: TensorRef) -> int:
        """Bytes of a tensor."""
        samples = ref.samples
        num_samples = 0 if samples is None else samples[1] - samples[0]
        key = (ref.kind, ref.first, ref.last, num_samples)
        if key not in self._sizes:
            self._sizes[key] = ref.nbytes(self.graph)
        return self._sizes[key]

    # Issuing: every thread goes on until it meets an event that is not recorded yet.

    def _issue_all(self) -> None:
        programs = [program for _, program in self.schedule.all_programs()]
        awake = list(range(len(programs)))[::-1]
        asleep: dict[int, list[int]] = {}
        while awake:
            number = awake.pop()
            missing = self._issue(number, programs[number], awake, asleep)
            if missing is not None:
                asleep.setdefault(missing, []).append(number)
        for thread, program in zip(self._threads, programs, strict=True):
            if thread.next < len(program):
                issue_order(self.schedule)  # says which wait for each other
        self._start_late(programs[-1])

    def _start_late(self, program: tuple[Instruction, ...]) -> None:
        """Start the host's updates where they wait for everything else."""
        host = self._threads[-1]
        after = [last for thread in self._threads for last in thread.last.values()]
        for index in self._late:
            host.waits.setdefault(HOST_STREAM, []).extend(after)
            self._start(host, self.schedule.num_devices, index, program[index])
            after = []

    def _issue(
        self,
        number: int,
        program: tuple[Instruction, ...],
        awake: list[int],
        asleep: dict[int, list[int]],
    ) -> int | None:
        """Issue until the end, or return the event that is missing."""
        thread, events = self._threads[number], self._events
        for index in range(thread.next, len(program)):
            step = program[index]
            op = step.op
            if op is Op.ALLOC or op is Op.DROP:
                continue
            if op is Op.WAIT:
                assert step.event is not None
                event = events.get(step.event)
                if event is None:
                    thread.next = index
                    return step.event
                thread.waits.setdefault(step.stream, []).extend(event.over)
                # A later activity of the host has the higher number, and ends later.
                if event.held > thread.held:
                    thread.held = event.held
            elif op is Op.RECORD:
                assert step.event is not None
                events[step.event] = self._record(thread, number, step.stream)
                awake.extend(reversed(asleep.pop(step.event, [])))
            elif self._waits(number, step):
                self._late.append(index)
            else:
                self._start(thread, number, index, step)
        thread.next = len(program)
        return None

    def _waits(self, program: int, step: Instruction) -> bool:
        is_update = step.task is not None and step.task.kind is TaskKind.UPDATE
        is_host = program == self.schedule.num_devices
        return is_host and is_update and self.machine.updates_wait

    def _record(self, thread: _Thread, program: int, stream: str) -> _Event:
        waits = thread.waits.get(stream, [])
        is_host = program == self.schedule.num_devices
        if len(waits) > _MAX_WAITS or (is_host and waits):
            # It waited and did nothing yet. One activity stands for that: the host's thread is
            # held by it, and on a device every event would carry the whole list on.
            lane = (HOST_STREAM,) if is_host else ((program, stream),)
            thread.last[stream] = self.activities.add(lane, waits)
            thread.waits[stream] = waits = []
        last = thread.last.get(stream, -1)
        if is_host:
            return _Event((last,) if last >= 0 else (), last)
        over = (*waits, last) if last >= 0 else tuple(waits)
        if thread.held != thread.saw.get(stream, -1):
            over = (*over, thread.held)
        return _Event(over, thread.held)

    def _start(self, thread: _Thread, program: int, index: int, step: Instruction) -> None:
        stream = step.stream
        after = thread.waits.get(stream, [])
        if program == self.schedule.num_devices:
            lane: tuple[object, ...] = (HOST_STREAM,)
        else:
            lane = ((program, stream),)
            if thread.held != thread.saw.get(stream, -1):
                after.append(thread.held)
                thread.saw[stream] = thread.held
        seconds, units, path = self._costs(program, step)
        number = self.activities.add(lane, after, seconds=seconds, units=units, resources=path)
        thread.last[stream] = number
        thread.waits[stream] = []
        self.made.append((number, program, index))

    # What an instruction takes: seconds at least, units, and of what.

    def _costs(self, program: int, step: Instruction) -> tuple[float, float, Path]:
        if step.task is None:
            assert step.ref is not None
            return 0.0, self.nbytes(step.ref), self.links.path(step.op, program, step.peer)
        if step.stream == HOST_STREAM:
            return self._on_host(step)
        key = (step.task.kind, step.task.pack, step.task.num_samples, _kept(step))
        seconds = self._seconds.get(key)
        if seconds is None:
            seconds = self._seconds[key] = self._work_s(step)
        if step.task.kind is TaskKind.UPDATE:
            seconds += self._update_s(program, step)
        seconds += self.machine.devices[program].task_overhead_s
        return (seconds, *self.links.compute_units(seconds))

    def _on_host(self, step: Instruction) -> tuple[float, float, Path]:
        task = step.task
        assert task is not None
        if task.addend is not None or task.kind is TaskKind.NORMS:
            nbytes = self._added_nbytes(step)
            seconds = nbytes / self.machine.host.accumulate_bytes_per_s
            return (seconds, *self.links.accumulate_units(seconds, nbytes))
        seconds = update_s(self.costs, task.pack)
        return (seconds, *self.links.update_units(seconds, self._gradient_nbytes(step)))

    def _added_nbytes(self, step: Instruction) -> int:
        """Bytes that take as long to add; norms are one of the three passes that adding is."""
        if step.task is not None and step.task.addend is not None:
            return self.nbytes(step.task.addend)
        return self._gradient_nbytes(step) // 3 if self.machine.updates_wait else 0

    def _work_s(self, step: Instruction) -> float:
        task = step.task
        assert task is not None
        if task.kind is TaskKind.UPDATE:
            return 0.0
        of = forward_s if task.kind is TaskKind.FORWARD else backward_s
        seconds = of(self.costs, task.pack, task.num_samples)
        if task.kind is TaskKind.BACKWARD and _kept(step) is not None:
            spared = forward_s if _kept(step) is TensorKind.SAVED else products_s
            seconds -= spared(self.costs, task.pack, task.num_samples)
        return seconds

    def _update_s(self, program: int, step: Instruction) -> float:
        rate = self.machine.devices[program].update_bytes_per_s
        if not rate:
            # A plan of somebody's own may do what no search would choose: it gets the host's time.
            return update_s(self.costs, step.task.pack) if step.task else 0.0
        return self._gradient_nbytes(step) / rate

    def _gradient_nbytes(self, step: Instruction) -> int:
        refs = {ref for ref in step.reads if ref.is_gradient_part and not ref.part}
        return sum(self.nbytes(ref) for ref in refs)


def _kept(step: Instruction) -> TensorKind | None:
    """What a BACKWARD has of its FORWARD: all that it saved, results of products, or nothing."""
    return next((ref.kind for ref in step.reads if ref.is_kept), None)
