"""Another plan between two steps: when their costs are known, or when memory was taken away.

Only plans that compute the same bits are considered (`harmony.planner.search.numerics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from harmony.core.timeline import Timeline
from harmony.core.units import format_seconds
from harmony.core.warn import warn
from harmony.engine.planned import Planned
from harmony.engine.variant import Variant
from harmony.errors import PlanError
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.simulate import Simulation
from harmony.planner.search.refine import Refined, refine
from harmony.planner.search.search import choose
from harmony.profiling.server import usable_nbytes
from harmony.report.session import ModelRecord
from harmony.runtime.device import DeviceContext
from harmony.runtime.exec.memory_bound import is_held

WARM_UP = 1
"""Steps that are not looked at: the first allocates, and holds its updates back."""

NUM_STEPS = 4
"""Steps that are."""

WORTHWHILE = 0.95
"""Another plan has to be this much faster: a switch allocates and prepares everything anew."""

MOST_SHRINKS = 3
"""How often one step is planned again for less memory; then it is an error."""

LESS = 0.95
"""Of what is free, since what others take may grow: each time that it was not enough."""

WITHOUT_GAPS = 0.9
"""Of what a plan's tensors take, for the next: with the gaps between them it was too much."""

MOST_SWITCHES = 2
"""How often the plan for a minibatch is changed; figures that still differ then are noise."""


@dataclass
class _Watched:
    """The steps of one plan so far, and how often the plan was changed before."""

    plan: Plan
    switches: int = 0
    num_steps: int = 0
    timelines: list[Timeline] = field(default_factory=list)


class Feedback:
    """Watches the steps of a model and changes plans between two of them."""

    def __init__(self, record: ModelRecord, activations: str = "auto") -> None:
        self._record = record
        self._activations = activations
        # Of a capture that is forgotten nothing is left here.
        self._watched: WeakKeyDictionary[Variant, dict[int, _Watched]] = WeakKeyDictionary()

    def stepped(
        self, variant: Variant, planned: Planned, timeline: Timeline, excess: str = ""
    ) -> None:
        """Note a step; after a few, plan again with what they took.

        Args:
            excess: in what the step broke the limit of device memory.
        """
        plan = planned.plan
        known = self._watched.setdefault(variant, {})
        watched = known.get(plan.minibatch)
        if watched is None or watched.plan is not plan:
            switches = 0 if watched is None else watched.switches
            watched = known[plan.minibatch] = _Watched(plan, switches)
        if excess and watched.switches < MOST_SHRINKS:
            watched.switches += 1
            self._shrink(variant, planned, excess)
            return
        watched.num_steps += 1
        if not WARM_UP < watched.num_steps <= WARM_UP + NUM_STEPS:
            return
        watched.timelines.append(timeline)
        if len(watched.timelines) == NUM_STEPS:
            self._reconsider(variant, planned, watched)
            watched.timelines.clear()

    def _shrink(self, variant: Variant, planned: Planned, excess: str) -> None:
        """Go on with a plan that leaves more room for gaps, if there is one."""
        try:
            smaller = _planned_for(planned, _without_gaps(planned), self._activations)
        except PlanError as error:
            warn(f"{excess}. The plan stays, as there is none for less: {error}")
            return
        variant.learn(smaller)
        self._record.facts["plan changed"] = f"{excess}: planned again with more room for gaps"

    def _reconsider(self, variant: Variant, planned: Planned, watched: _Watched) -> None:
        plan, known = planned.plan, planned.measured
        found = refine(
            plan.schedule, known.costs, known.machine, planned.predicted, watched.timelines
        )
        if found.worst * WORTHWHILE < 1 or watched.switches >= MOST_SWITCHES:
            return
        now_s = Simulation(plan.schedule, planned.graph, found.costs, found.machine).step_s
        better = better_plan(planned, found, now_s, self._activations)
        if better is None:
            return
        watched.switches += 1
        learnt = replace(known, costs=found.costs, machine=found.machine)
        variant.learn(replace(planned, plan=better, measured=learnt))
        self._record.facts["plan changed"] = (
            f"after {WARM_UP + NUM_STEPS} steps: the costs measured in them predict "
            f"{format_seconds(now_s)} a step for the plan until then, "
            f"{format_seconds(better.step_s)} for this one"
        )


def better_plan(planned: Planned, found: Refined, now_s: float, activations: str) -> Plan | None:
    """Return a plan that computes the same and is clearly faster; None if there is none.

    Args:
        now_s: what the plan until now takes by the same costs.
        activations: as for `choose`.
    """
    plan = planned.plan
    try:
        other = choose(
            planned.graph,
            found.costs,
            found.machine,
            plan.minibatch,
            activations=activations,
            phase=plan.spec.phase,
            like=plan,
        )
    except PlanError:  # by these figures nothing fits: what runs does
        return None
    return None if other.step_s > WORTHWHILE * now_s else other


def shrunk(
    planned: Planned,
    contexts: Sequence[DeviceContext],
    limit_nbytes: int | None,
    activations: str,
    attempt: int,
) -> Planned:
    """Plan again for the memory that devices have now, so that the same is computed.

    Args:
        contexts: devices on which the model holds nothing.
        limit_nbytes: that may be used of each; None for all that is free.
        attempt: how often that was not enough before.

    Raises:
        DoesNotFitError: if no plan that computes the same fits.
    """
    known = planned.measured
    usable = [int(usable_nbytes(context, limit_nbytes) * LESS**attempt) for context in contexts]
    before = [device.memory_nbytes for device in known.machine.devices]
    room = [min(pair) for pair in zip(usable, before, strict=True)]
    if is_held(contexts[0].device, limit_nbytes) and room == before:  # gaps have taken it
        room = _without_gaps(planned)
    return _planned_for(planned, room, activations)


def _without_gaps(planned: Planned) -> list[int]:
    """Bytes of each device for a plan whose tensors leave more room for the gaps between them."""
    most = int(max(planned.plan.peak_nbytes) * WITHOUT_GAPS)
    return [min(most, d.memory_nbytes) for d in planned.measured.machine.devices]


def _planned_for(planned: Planned, room: Sequence[int], activations: str) -> Planned:
    known, plan = planned.measured, planned.plan
    devices = tuple(
        replace(device, memory_nbytes=nbytes)
        for device, nbytes in zip(known.machine.devices, room, strict=True)
    )
    machine = replace(known.machine, devices=devices)
    other = choose(
        planned.graph,
        known.costs,
        machine,
        plan.minibatch,
        activations=activations,
        phase=plan.spec.phase,
        like=plan,
    )
    return replace(planned, plan=other, measured=replace(known, machine=machine))
