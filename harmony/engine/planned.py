"""What the plans of a variant are made from, and a plan with what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.timeline import Timeline
from harmony.engine.inflight import Reached, backward_schedule, differentiable_outputs
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.tasks import Phase, Samples, StepSpec, TaskKind
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.trial import inference_schedule
from harmony.report.metrics import forward_seconds

Asked = tuple[str, int | None, str]
"""What a plan is asked for beside its minibatch: mode, microbatch size, activations."""


@dataclass(frozen=True)
class Measured:
    """What plans are made from.

    Attributes:
        graph: as captured, with the bytes that each forward saves for its backward.
        costs: of its layers.
        machine: with the share of a layer's time that needs a core.
    """

    graph: LayerGraph
    costs: CostTable
    machine: Machine


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan for a minibatch.

    Attributes:
        graph: what was measured, with what is known of parts of batches.
        measured: what the plan was made from.
        asked: what was asked for; None where the plan was given, or is like another length's.
        backward_nbytes: per device, what a backward of its own has taken, once there was one.
    """

    plan: Plan
    graph: LayerGraph
    measured: Measured
    asked: Asked | None = None
    backward_nbytes: list[int] = field(init=False, default_factory=list)
    _backwards: dict[tuple[Reached, bool], Schedule] = field(init=False, default_factory=dict)

    @cached_property
    def predicted(self) -> Timeline:
        """What the plan is expected to do."""
        known = self.measured
        return simulate(self.plan.schedule, self.graph, known.costs, known.machine)

    @cached_property
    def forward_s(self) -> float:
        """Predicted seconds of the forward where it has a schedule of its own; else 0."""
        known = self.measured
        return forward_seconds(self.plan, self.graph, known.costs, known.machine)

    @cached_property
    def microbatches(self) -> tuple[Samples, ...]:
        """All microbatches, of FORWARD and BACKWARD, each once, in order."""
        return tuple(microbatches_of(self.plan.spec))

    @cached_property
    def in_order(self) -> Mapping[TaskKind, tuple[Samples, ...]]:
        """The microbatches of FORWARD and those of BACKWARD, one replica's after the other's."""
        spec = self.plan.spec
        replicas = range(len(spec.shares))
        return {
            kind: tuple(s for replica in replicas for s in spec.microbatches(replica, kind))
            for kind in (TaskKind.FORWARD, TaskKind.BACKWARD)
        }

    @cached_property
    def forward_end(self) -> int:
        """The layers below it have a FORWARD task; the others run first in BACKWARD."""
        spec = self.plan.spec
        if spec.phase is not Phase.TRAIN:
            return self.graph.num_layers
        return spec.forward_packs[-1].last if spec.forward_packs else 0

    @cached_property
    def random_starts(self) -> frozenset[int]:
        """Layers at which a pack starts, where layers draw random numbers; else none."""
        spec = self.plan.spec
        draws = any(layer.uses_rng for layer in self.graph.layers)
        packs = (*spec.forward_packs, *spec.backward_packs) if draws else ()
        return frozenset(pack.first for pack in packs)

    @cached_property
    def inference(self) -> Schedule:
        """A forward that nothing follows, with the plan's packs."""
        plan, costs = self.plan, self.measured.costs
        return inference_schedule(self.graph, costs, plan.machine, plan.spec, plan.policy)

    @cached_property
    def keeps(self) -> bool:
        """Whether a forward of its own is to leave activations for its backward."""
        return self.plan.spec.phase is Phase.BACKWARD and bool(self.plan.spec.kept)

    def backward(self, reached: Reached, finds_kept: bool) -> Schedule:
        """Return the backward from the outputs that a gradient has come for.

        Args:
            finds_kept: whether what its forward was to leave is there.
        """
        if reached == differentiable_outputs(self.graph) and finds_kept == self.keeps:
            return self.plan.schedules[Phase.BACKWARD]
        key = reached, finds_kept
        if key not in self._backwards:
            costs = self.measured.costs
            self._backwards[key] = backward_schedule(self.plan, self.graph, costs, *key)
        return self._backwards[key]


def microbatches_of(spec: StepSpec) -> list[Samples]:
    """All microbatches, of FORWARD and BACKWARD, each once, in order."""
    replicas = range(len(spec.shares))
    every = {
        samples
        for kind in (TaskKind.FORWARD, TaskKind.BACKWARD)
        for replica in replicas
        for samples in spec.microbatches(replica, kind)
    }
    return sorted(every)
