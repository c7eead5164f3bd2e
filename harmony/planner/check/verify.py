"""The checker of schedules. It shares no code with what makes them, or chooses between them.

Of the planner it knows the data only (tasks, schedules, costs). What a step must leave behind
(`harmony.planner.check.kept`) and what memory a device needs (`harmony.planner.check.peak`) it
works out by itself.

It walks a schedule in an order in which it could be issued, keeps vector clocks over its streams
and remembers for each memory who wrote what is in it. A schedule passes if

- *order*: two accesses to the same memory, one of them writing, are always ordered by streams
  and events, never by luck;
- *residency*: every Run finds each tensor it reads on its device, as the task wrote it that
  would have written it in plain PyTorch; slots hold one pack; nothing leaks;
- *completeness*: it runs every task of a task graph once, and each reads and writes what it
  should there. Their order need not be looked at: each found what those before it wrote;
- *order of changes*: layers that change their buffers do so microbatch by microbatch;
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
from harmony.planner.check.form import check_form
from harmony.planner.check.kept import brought, left_behind
from harmony.planner.check.peak import Peak, PeakMemory
from harmony.planner.check.together import check_together
from harmony.planner.ir.issue import Position, excerpt, issue_order, program_name, refuse
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Phase, Task, TaskGraph, TaskKind, state
from harmony.planner.predict.cost import CostTable

__all__ = ["Checked", "check_together", "verify"]


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
    resident = check_form(schedule, graph)
    runs = _check_runs(schedule, programs)
    order = issue_order(schedule)
    clocks = Clocks()
    spec = None if tasks is None else tasks.spec
    contents = Contents(schedule, graph, clocks, resident, brought(graph, phase, spec))
    for at in order:
        step = programs[at.program][at.index]
        if step.op in (Op.RECORD, Op.WAIT):
            clocks.event(at.program, step)
        else:
            clocks.advance(at.program, step)
            contents.do(at, step)
    outputs = frozenset(graph.output_ids)
    contents.finish(outputs if spec is None else left_behind(graph, spec), phase)
    if tasks is not None:
        _check_complete(schedule, tasks, runs)
    _check_changes(schedule, graph, runs, phase)
    return _check_capacity(schedule, graph, costs)


def _check_runs(
    schedule: Schedule, programs: Sequence[Sequence[Instruction]]
) -> dict[Task, Position]:
    """Find where each task runs; each at most once, and on the side where it belongs."""
    runs: dict[Task, Position] = {}
    for number, program in enumerate(programs):
        on_host = number == schedule.num_devices
        for index, step in enumerate(program):
            if step.op is not Op.RUN or step.task is None:
                continue
            at = Position(number, index)
            if step.task in runs:
                raise refuse(schedule, at, f"{step.task} runs twice")
            is_host_task = step.task.kind not in (TaskKind.FORWARD, TaskKind.BACKWARD)
            if step.task.kind is TaskKind.UPDATE and not on_host:
                is_host_task = state(step.task.pack) not in schedule.devices[number].resident
            if is_host_task is not on_host:
                raise refuse(schedule, at, f"{step.task} cannot run here")
            runs[step.task] = at
    return runs


def _check_complete(schedule: Schedule, tasks: TaskGraph, runs: dict[Task, Position]) -> None:
    """Every task runs, and reads and writes what it should."""
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


def _check_changes(
    schedule: Schedule, graph: LayerGraph, runs: dict[Task, Position], phase: Phase
) -> None:
    """Buffers change on one device, in the order of the microbatches, as in plain PyTorch."""
    changing = {layer.index for layer in graph.layers if layer.changes_state}
    if not changing:
        return
    changers = [task for task in runs if task.kind is TaskKind.FORWARD]
    if phase is Phase.TRAIN:
        # The last pack has no FORWARD: its BACKWARD is both.
        last = graph.num_layers - 1
        changers += [t for t in runs if t.kind is TaskKind.BACKWARD and last in t.pack]
    latest: dict[int, Task] = {}
    for task in sorted(changers, key=lambda task: task.samples or (0, 0)):
        for layer in changing.intersection(task.pack):
            before = latest.get(layer, task)
            if runs[before].program != runs[task].program or runs[before] > runs[task]:
                why = f"{task} does not come after {before}, and both change buffers"
                raise refuse(schedule, runs[task], why)
            latest[layer] = task


def _check_capacity(schedule: Schedule, graph: LayerGraph, costs: CostTable | None) -> Checked:
    memory = PeakMemory(schedule, graph, costs)
    peaks = [memory.of(index) for index in range(schedule.num_devices)]
    for index, (peak, device) in enumerate(zip(peaks, schedule.devices, strict=True)):
        if peak.nbytes > device.memory_nbytes:
            raise DoesNotFitError(_overflow(schedule, index, peak))
    return Checked(
        tuple(peak.nbytes for peak in peaks),
        tuple(_peak_text(schedule, index, peak) for index, peak in enumerate(peaks)),
        memory.stash_nbytes(),
    )


def _peak_text(schedule: Schedule, index: int, peak: Peak) -> str:
    return str(schedule.programs[index][peak.index]) if peak.index >= 0 else ""


def _overflow(schedule: Schedule, index: int, peak: Peak) -> str:
    limit = schedule.devices[index].memory_nbytes
    parts = (
        f"slots {format_bytes(peak.fixed)}, values {format_bytes(peak.values)},"
        f" workspace {format_bytes(peak.workspace)}"
    )
    lines = "" if peak.index < 0 else "\n" + excerpt(schedule, Position(index, peak.index))
    return (
        f"{program_name(schedule, index)} needs {format_bytes(peak.nbytes)} ({parts}) and has"
        f" {format_bytes(limit)}{lines}"
    )
