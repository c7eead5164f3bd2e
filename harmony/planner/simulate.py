"""Predicts what a schedule does on a machine: a schedule and costs to a timeline.

The model of a device is the executor's: one thread issues the program from top to bottom, in no
time, and is held by a Wait whose event has not been recorded yet; each stream is a queue; each
link carries one copy at a time in each direction. The host's thread does its work itself, so a
Wait of its own holds it until what was recorded is over. A wrap-around pipeline gives each
device one sender, so two Sends never meet at their receiver.

    start of an instruction = max(its stream is free, its thread issues it, what it waits for)
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from harmony.layergraph import LayerGraph
from harmony.machine import Machine
from harmony.planner.cost import CostTable, backward_s, forward_s, update_s
from harmony.planner.issue import issue_order, program_name
from harmony.planner.kinds import span_kinds
from harmony.planner.memory import Workspace, device_peak, host_nbytes
from harmony.planner.schedule import Instruction, Op, Schedule
from harmony.planner.stalls import stall_causes
from harmony.planner.tasks import Task, TaskKind
from harmony.timeline import Span, Timeline

__all__ = ["simulate", "stall_causes"]


def simulate(
    schedule: Schedule, graph: LayerGraph, costs: CostTable, machine: Machine
) -> Timeline:
    """Return the predicted timeline of one step.

    Raises:
        ScheduleError: if the schedule deadlocks.
    """
    kinds = list(span_kinds(schedule, graph).values())
    programs = [program for _, program in schedule.all_programs()]
    clock = _Clock(schedule, _Durations(graph, costs, machine))
    for at in issue_order(schedule):
        step = programs[at.program][at.index]
        clock.issue(at.program, at.index, step, kinds[at.program][at.index])
    workspace = Workspace(graph, costs)
    devices = range(schedule.num_devices)
    spans = share_cores(clock.spans, machine)
    return Timeline(
        spans=spans,
        step_s=max((span.end_s for span in spans), default=0.0),
        peak_nbytes=[device_peak(schedule, i, graph, workspace).nbytes for i in devices],
        host_nbytes=host_nbytes(schedule, graph),
    )


def share_cores(spans: list[Span], machine: Machine) -> list[Span]:
    """Return the spans as they are when virtual GPUs have to share the host's cores.

    While devices and the update thread together want more cores than there are, everything takes
    longer by that factor: time is stretched there.
    """
    cores = max(1, machine.host.num_cores)
    work = [span for span in spans if span.lane.endswith((".compute", ".update"))]
    if machine.cpu_share == 0.0 or not work:
        return spans
    changes: dict[float, float] = {}
    for span in work:
        wanted = machine.cpu_share if span.lane.endswith(".compute") else 1.0
        changes[span.start_s] = changes.get(span.start_s, 0.0) + wanted
        changes[span.end_s] = changes.get(span.end_s, 0.0) - wanted
    times, stretched = [0.0], [0.0]
    wanted = 0.0
    for at, change in sorted(changes.items()):
        factor = max(1.0, wanted / cores)
        stretched.append(stretched[-1] + (at - times[-1]) * factor)
        times.append(at)
        wanted += change

    def later(at: float) -> float:
        index = bisect_right(times, at) - 1
        end = min(index + 1, len(times) - 1)
        if end == index or times[end] == times[index]:
            return stretched[index] + at - times[index]
        share = (at - times[index]) / (times[end] - times[index])
        return stretched[index] + share * (stretched[end] - stretched[index])

    return [replace(span, start_s=later(span.start_s), end_s=later(span.end_s)) for span in spans]


class _Durations:
    """Seconds and bytes of single instructions."""

    def __init__(self, graph: LayerGraph, costs: CostTable, machine: Machine) -> None:
        self.graph = graph
        self.costs = costs
        self.machine = machine
        self.known: dict[tuple[TaskKind, range, int], float] = {}

    def nbytes(self, step: Instruction) -> int:
        """Bytes that a copy moves."""
        return 0 if step.ref is None else step.ref.nbytes(self.graph)

    def seconds(self, program: int, step: Instruction) -> float:
        """Seconds of a Run or a copy on the device of its program, or on the host."""
        if step.task is not None:
            on_device = program < self.machine.num_devices and step.stream == "compute"
            overhead = self.machine.devices[program].task_overhead_s if on_device else 0.0
            return overhead + self._work(step.task)
        device = self.machine.devices[program]
        rate = {
            Op.SWAP_IN: device.h2d_bytes_per_s,
            Op.SWAP_OUT: device.d2h_bytes_per_s,
            Op.SEND: device.p2p_bytes_per_s,
        }[step.op]
        return self.nbytes(step) / rate

    def _work(self, task: Task) -> float:
        if task.addend is not None:
            nbytes = task.addend.nbytes(self.graph)
            return nbytes / self.machine.host.accumulate_bytes_per_s
        layers = range(task.pack.first, task.pack.last)
        key = (task.kind, layers, task.num_samples)
        if key not in self.known:
            if task.kind is TaskKind.UPDATE:
                self.known[key] = update_s(self.costs, layers)
            else:
                of = forward_s if task.kind is TaskKind.FORWARD else backward_s
                self.known[key] = of(self.costs, layers, task.num_samples)
        return self.known[key]


@dataclass
class _Event:
    """When an event was recorded by its thread, and when what it stands for is over."""

    issued_s: float
    over_s: float


class _Clock:
    """Follows threads, streams and events through time."""

    def __init__(self, schedule: Schedule, durations: _Durations) -> None:
        self.schedule = schedule
        self.durations = durations
        self.spans: list[Span] = []
        self.threads = [0.0] * (schedule.num_devices + 1)
        self.streams: dict[tuple[int, str], float] = {}
        self.events: dict[int, _Event] = {}

    def issue(self, program: int, index: int, step: Instruction, kind: str) -> None:
        """Issue one instruction."""
        stream = (program, step.stream)
        free_s = max(self.streams.get(stream, 0.0), self.threads[program])
        if step.op is Op.RECORD and step.event is not None:
            self.events[step.event] = _Event(self.threads[program], free_s)
        elif step.op is Op.WAIT and step.event is not None:
            event = self.events[step.event]
            self.streams[stream] = max(free_s, event.over_s)
            held_s = event.over_s if self._is_host(program) else event.issued_s
            self.threads[program] = max(self.threads[program], held_s)
        elif kind:
            end_s = free_s + self.durations.seconds(program, step)
            self.streams[stream] = end_s
            if self._is_host(program):
                self.threads[program] = end_s
            lane = f"{program_name(self.schedule, program)}.{step.stream}"
            nbytes = self.durations.nbytes(step)
            self.spans.append(Span(lane, str(step), kind, free_s, end_s, nbytes, index))

    def _is_host(self, program: int) -> bool:
        return program == self.schedule.num_devices
