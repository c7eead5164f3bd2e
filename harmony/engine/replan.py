"""After some steps: what they really took, and whether another plan would now be better.

Only plans that compute the same bits are considered (`harmony.planner.search.numerics`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from harmony.core.timeline import Timeline
from harmony.core.units import format_seconds
from harmony.engine.planned import Planned
from harmony.engine.variant import Variant
from harmony.errors import PlanError
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.simulate import predict_s
from harmony.planner.search.refine import Refined, refine
from harmony.planner.search.search import choose
from harmony.report.session import ModelRecord

WARM_UP = 1
"""Steps that are not looked at: the first allocates, and holds its updates back."""

NUM_STEPS = 4
"""Steps that are."""

WORTHWHILE = 0.95
"""Another plan has to be this much faster: a switch allocates and prepares everything anew."""

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

    def stepped(self, variant: Variant, planned: Planned, timeline: Timeline) -> None:
        """Note a step; after a few, plan again with what they took."""
        plan = planned.plan
        known = self._watched.setdefault(variant, {})
        watched = known.get(plan.minibatch)
        if watched is None or watched.plan is not plan:
            switches = 0 if watched is None else watched.switches
            watched = known[plan.minibatch] = _Watched(plan, switches)
        watched.num_steps += 1
        if not WARM_UP < watched.num_steps <= WARM_UP + NUM_STEPS:
            return
        watched.timelines.append(timeline)
        if len(watched.timelines) == NUM_STEPS:
            self._reconsider(variant, planned, watched)
            watched.timelines.clear()

    def _reconsider(self, variant: Variant, planned: Planned, watched: _Watched) -> None:
        plan, known = planned.plan, planned.measured
        found = refine(
            plan.schedule, known.costs, known.machine, planned.predicted, watched.timelines
        )
        if found.worst * WORTHWHILE < 1 or watched.switches >= MOST_SWITCHES:
            return
        now_s = predict_s(plan.schedule, planned.graph, found.costs, found.machine)
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
