"""The checker of schedules. It shares no code with the passes that make them.

It walks a schedule in an order in which it could be issued, keeps vector clocks over its streams
and remembers for each memory who wrote what is in it. A schedule passes if

- *order*: two accesses to the same memory, one of them writing, are always ordered by streams
  and events, never by luck;
- *residency*: every Run finds each tensor it reads on its device, as the task wrote it that
  would have written it in plain PyTorch; slots hold one pack; nothing leaks;
- *completeness*: it runs every task of a task graph once, in an order that the edges allow;
- *capacity*: no device needs more memory than it has.

Any two runs of a schedule without races read the same values everywhere, so one walk is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError, ScheduleError
from harmony.planner.check.clocks import Clocks
from harmony.planner.check.contents import Contents
from harmony.planner.ir.issue import Place, excerpt, issue_order, program_name, refuse
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.task_graph import kept_values
from harmony.planner.ir.tasks import Phase, Task, TaskGraph, TaskKind, state
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.memory import Peak, Workspace, device_peak, stash_nbytes


@dataclass(frozen=True)
class Checked:
    """What the checker measured on the way.

    Attributes:
        peak_nbytes: per device the most bytes in use.
        peak_at: per device the instruction at that moment, as text.
        stash_nbytes: bytes of host memory for values and gradients of values.
    """

    peak_nbytes: tuple[int, ...]
    peak_at: tuple[str, ...]
    stash_nbytes: int


def verify(
    schedule: Schedule,
    graph: LayerGraph,
    costs: CostTable | None = None,
    phase: Phase = Phase.TRAIN,
    tasks: TaskGraph | None = None,
) -> Checked:
    """Check a schedule; with costs also the memory that Runs need, with tasks also completeness.

    Raises:
        ScheduleError: with the lines around the wrong instruction and what is wrong with it.
        DoesNotFitError: if a device needs more memory than it has.
    """
    programs = [program for _, program in schedule.all_programs()]
    runs = _check_runs(schedule, programs)
    order = issue_order(schedule)
    clocks = Clocks()
    contents = Contents(schedule, graph, clocks, phase)
    for at in order:
        step = programs[at.program][at.index]
        if step.op in (Op.RECORD, Op.WAIT):
            clocks.event(at.program, step)
        else:
            clocks.advance(at.program, step)
            contents.do(at, step)
    kept = frozenset(graph.output_ids)
    if tasks is not None:
        kept |= kept_values(tasks.layers, tasks.spec)
    contents.finish(kept)
    if tasks is not None:
        _check_complete(schedule, tasks, runs, clocks)
    return _check_capacity(schedule, graph, costs)


def _check_runs(
    schedule: Schedule, programs: Sequence[Sequence[Instruction]]
) -> dict[Task, Place]:
    """Find where each task runs; each at most once, and on the side where it belongs."""
    runs: dict[Task, Place] = {}
    for number, program in enumerate(programs):
        on_host = number == schedule.num_devices
        for index, step in enumerate(program):
            if step.op is not Op.RUN or step.task is None:
                continue
            at = Place(number, index)
            if step.task in runs:
                raise refuse(schedule, at, f"{step.task} runs twice")
            is_host_task = step.task.kind in (TaskKind.UPDATE, TaskKind.ACCUMULATE)
            if step.task.kind is TaskKind.UPDATE and not on_host:
                is_host_task = state(step.task.pack) not in schedule.devices[number].resident
            if is_host_task is not on_host or step.stream not in ("compute", "update"):
                raise refuse(schedule, at, f"{step.task} cannot run here")
            runs[step.task] = at
    return runs


def _check_complete(
    schedule: Schedule, tasks: TaskGraph, runs: dict[Task, Place], clocks: Clocks
) -> None:
    """Every task runs, reads and writes what it should, after what it depends on."""
    programs = [program for _, program in schedule.all_programs()]
    missing = Counter(tasks.tasks) - Counter(list(runs))
    if missing:
        raise ScheduleError(f"tasks that never run: {', '.join(map(str, missing))}")
    for task, at in runs.items():
        step = programs[at.program][at.index]
        if task not in tasks.reads:
            raise refuse(schedule, at, f"{task} is not a task of this step")
        if step.reads != tasks.reads[task] or step.writes != tasks.writes[task]:
            raise refuse(schedule, at, f"{task} does not read and write what it should")
    for before, after in tasks.graph.edges:
        only_read = set(tasks.writes[before]).isdisjoint(tasks.reads[after])
        if after.kind is TaskKind.UPDATE and only_read:
            # It overwrites what the earlier task read, but that one read its own copy.
            continue
        if not clocks.is_before(before, after):
            why = f"{after} does not wait for {before}"
            raise refuse(schedule, runs[after], why)


def _check_capacity(schedule: Schedule, graph: LayerGraph, costs: CostTable | None) -> Checked:
    workspace = Workspace(graph, costs)
    peaks = [
        device_peak(schedule, index, graph, workspace) for index in range(schedule.num_devices)
    ]
    for index, (peak, device) in enumerate(zip(peaks, schedule.devices, strict=True)):
        if peak.nbytes > device.memory_nbytes:
            raise DoesNotFitError(_overflow(schedule, index, peak))
    return Checked(
        tuple(peak.nbytes for peak in peaks),
        tuple(_peak_text(schedule, index, peak) for index, peak in enumerate(peaks)),
        stash_nbytes(schedule, graph),
    )


def _peak_text(schedule: Schedule, index: int, peak: Peak) -> str:
    return str(schedule.programs[index][peak.index]) if peak.index >= 0 else ""


def _overflow(schedule: Schedule, index: int, peak: Peak) -> str:
    limit = schedule.devices[index].memory_nbytes
    parts = (
        f"slots {format_bytes(peak.slots)}, values {format_bytes(peak.values)},"
        f" workspace {format_bytes(peak.workspace)}"
    )
    lines = "" if peak.index < 0 else "\n" + excerpt(schedule, Place(index, peak.index))
    return (
        f"{program_name(schedule, index)} needs {format_bytes(peak.nbytes)} ({parts}) and has"
        f" {format_bytes(limit)}{lines}"
    )
