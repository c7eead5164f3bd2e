"""Lanes: what each forward that awaits its backward keeps of its own on the host."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from harmony.core.layergraph import LayerGraph
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, TensorKind
from harmony.planner.predict.cost import CostTable
from harmony.planner.search.trial import checked_schedule
from harmony.runtime.exec.executor import Executor, PreparedSchedule
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.step.step import HostValues

Reached = frozenset[int]
"""Outputs that a gradient has come for."""


@dataclass(eq=False)
class Lane:
    """Host copies of the values of one minibatch, and the schedules that are bound to them.

    A forward takes a free lane; it is free again when nothing can ask for its backward any more.
    So there are never more lanes than forwards were waiting at one time.

    Attributes:
        values: what its forward leaves, beside what goes through the host meanwhile.
        prepared: by the id of the schedule; gone when the binding's device memory is.
    """

    values: HostValues = field(default_factory=dict)
    prepared: dict[int, PreparedSchedule] = field(default_factory=dict)
    is_taken: bool = False
    _gradients: dict[Reached, HostValues] = field(default_factory=dict)

    def backward_values(self, reached: Reached) -> HostValues:
        """Host copies for a backward from these outputs: the forward's, and gradients of its own.

        Which gradients go through the host depends on the outputs that the backward starts from.
        """
        values = self._gradients.setdefault(reached, {})
        values.update({k: s for k, s in self.values.items() if k[0] is TensorKind.VALUE})
        return values

    def free(self) -> None:
        """Let the next forward have it. May run on any thread: it is called when objects die."""
        self.is_taken = False


class Lanes:
    """The lanes of one executor, and the schedules that are prepared for them."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._taken: dict[int, list[Lane]] = {}
        self._own: dict[tuple[Phase, int], Lane] = {}

    def take(self, minibatch: int) -> Lane:
        """Return a lane that no other forward uses; it is free again after its ``free()``."""
        lanes = self._taken.setdefault(minibatch, [])
        lane = next((lane for lane in lanes if not lane.is_taken), None)
        if lane is None:
            lane = Lane()
            lanes.append(lane)
        lane.is_taken = True
        return lane

    def own(self, phase: Phase, minibatch: int) -> Lane:
        """Return the lane of a phase that nothing follows."""
        return self._own.setdefault((phase, minibatch), Lane())

    def prepare(self, schedule: Schedule, lane: Lane, values: HostValues) -> PreparedSchedule:
        """Return a schedule ready to run on a lane's values."""
        if not self._executor.fits_slots(schedule):
            self.forget()
        key = id(schedule)  # what is prepared keeps it alive
        if key not in lane.prepared:
            lane.prepared[key] = self._executor.prepare(schedule, values)
        return lane.prepared[key]

    def forget(self) -> None:
        """Prepare everything anew when it is wanted again: the device memory is another."""
        lanes = [lane for lanes in self._taken.values() for lane in lanes]
        for lane in (*lanes, *self._own.values()):
            lane.prepared.clear()


def differentiable_outputs(graph: LayerGraph) -> Reached:
    """Outputs that a gradient can come for."""
    return frozenset(v.id for v in graph.values if v.is_output and v.requires_grad)


def backward_schedule(
    plan: Plan, graph: LayerGraph, costs: CostTable, reached: Reached
) -> Schedule:
    """Return the schedule of a backward that starts from some of the outputs only.

    Zeros for the other outputs would give gradients to parameters that have none in plain
    PyTorch, and would have to be moved.

    Raises:
        PlanError: if the checker refuses it.
    """
    values = tuple(replace(v, is_output=v.id in reached) for v in graph.values)
    started = replace(graph, values=values)
    tasks = build_tasks(started, replace(plan.spec, phase=Phase.BACKWARD))
    return checked_schedule(tasks, costs, plan.machine, plan.policy)


def gradients_left(schedule: Schedule) -> frozenset[int]:
    """Ids of the values whose gradient a schedule leaves on the host."""
    return frozenset(
        step.ref.first
        for program in schedule.programs
        for step in program
        if step.op is Op.SWAP_OUT and step.ref is not None
        if step.ref.kind is TensorKind.VALUE_GRADIENT
    )


def parameters_read(schedule: Schedule, layout: ArenaLayout) -> tuple[str, ...]:
    """Names of the parameters and buffers that a schedule copies to the devices."""
    names: dict[str, None] = {}
    for ref in {s.ref for p in schedule.programs for s in p if s.op is Op.SWAP_IN}:
        if ref is None or not ref.is_parameter:
            continue
        by_layer = ref.kind is TensorKind.WEIGHTS
        regions = layout.layers[ref.first : ref.last] if by_layer else [layout.shared[ref.first]]
        names.update(dict.fromkeys(name for region in regions for name in region.places))
    return tuple(names)
