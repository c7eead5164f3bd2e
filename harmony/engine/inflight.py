"""Forwards in flight: what each keeps on the host until its backward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from harmony.core.layergraph import LayerGraph
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, TensorKind
from harmony.planner.predict.cost import CostTable
from harmony.planner.search.trial import checked_schedule, recomputing
from harmony.runtime.exec.executor import Executor, PreparedSchedule
from harmony.runtime.exec.left_behind import LeftBehind
from harmony.runtime.exec.out_of_memory import with_room
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.step.step import HostValues

Reached = frozenset[int]
"""Outputs that a gradient has come for."""


@dataclass(eq=False)
class InFlight:
    """Host copies of the values of one minibatch, and the schedules that are bound to them.

    A forward takes a free entry; it is free again when nothing can ask for its backward any more.
    So there are never more entries than forwards were waiting at one time.

    Attributes:
        values: what its forward leaves, beside what goes through the host meanwhile.
        prepared: by the id of the schedule; gone when the variant's device memory is.
        left: where activations wait that its forward has left, if they are still there.
        key: whose those are.
    """

    values: HostValues = field(default_factory=dict)
    prepared: dict[int, PreparedSchedule] = field(default_factory=dict)
    is_taken: bool = False
    left: LeftBehind | None = None
    key: object = field(default_factory=object)
    _gradients: dict[tuple[Reached, bool], HostValues] = field(default_factory=dict)

    def backward_values(self, reached: Reached, finds_kept: bool) -> HostValues:
        """Host copies for a backward from these outputs: the forward's, and gradients of its own.

        Which gradients go through the host depends on the outputs that the backward starts from.
        """
        values = self._gradients.setdefault((reached, finds_kept), {})
        values.update({k: s for k, s in self.values.items() if k[0] is TensorKind.VALUE})
        return values

    def free(self) -> None:
        """Let the next forward have it. May run on any thread: it is called when objects die."""
        if self.left is not None:
            self.left.let_go_of(self.key)
        self.is_taken = False


class InFlightPool:
    """The entries of one executor, and the schedules that are prepared for them."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._taken: dict[int, list[InFlight]] = {}
        self._own: dict[tuple[Phase, int], InFlight] = {}
        self._old: list[InFlight] = []

    def take(self, minibatch: int) -> InFlight:
        """Return an entry that no other forward uses; it is free again after its ``free()``."""
        entries = self._taken.setdefault(minibatch, [])
        free = next((entry for entry in entries if not entry.is_taken), None)
        if free is None:
            free = InFlight(left=self._executor.left)
            entries.append(free)
        free.is_taken = True
        return free

    def own(self, phase: Phase, minibatch: int) -> InFlight:
        """Return the entry of a phase that nothing follows."""
        return self._own.setdefault((phase, minibatch), InFlight())

    def prepare(
        self, schedule: Schedule, in_flight: InFlight, values: HostValues
    ) -> PreparedSchedule:
        """Return a schedule ready to run on an entry's values.

        Raises:
            DoesNotFitError: if its slots have no room on a device.
        """
        key = id(schedule)  # what is prepared keeps it alive
        known = in_flight.prepared.get(key)
        if known is not None:  # in the slots that there are: others would have made it forgotten
            return known
        if not self._executor.fits_slots(schedule):
            self.forget()
        prepare = partial(self._executor.prepare, schedule, values)
        devices = [context.device for context in self._executor.contexts]
        prepared = with_room("preparing the plan", devices, prepare)
        in_flight.prepared[key] = prepared
        return prepared

    def drop(self) -> None:
        """Let later forwards have host copies of their own: their batches are parted otherwise."""
        self._own.clear()
        self._old += [held for pool in self._taken.values() for held in pool if held.is_taken]
        self._taken.clear()

    def forget(self) -> None:
        """Prepare everything anew when it is wanted again: the device memory is another."""
        taken = [entry for entries in self._taken.values() for entry in entries]
        for entry in (*taken, *self._own.values(), *self._old):
            entry.prepared.clear()
        self._old = [held for held in self._old if held.is_taken]


def differentiable_outputs(graph: LayerGraph) -> Reached:
    """Outputs that a gradient can come for."""
    return frozenset(v.id for v in graph.values if v.is_output and v.requires_grad)


def backward_schedule(
    plan: Plan, graph: LayerGraph, costs: CostTable, reached: Reached, finds_kept: bool
) -> Schedule:
    """Return the schedule of a backward that starts from some of the outputs only.

    Args:
        finds_kept: whether what its forward was to leave is there; else all is recomputed.

    Zeros for the other outputs would give gradients to parameters that have none in plain
    PyTorch, and would have to be moved.

    Raises:
        PlanError: if the checker refuses it.
    """
    values = tuple(replace(v, is_output=v.id in reached) for v in graph.values)
    started = replace(graph, values=values)
    spec, policy = replace(plan.spec, phase=Phase.BACKWARD), plan.policy
    if not finds_kept:
        spec, policy = recomputing(spec, policy)
    tasks, beside = build_tasks(started, spec), plan.schedules.values()
    return checked_schedule(tasks, costs, plan.machine, policy, beside)


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
