"""Chooses the plan: estimates every candidate, lowers the promising, keeps the fastest that fits.

The paper (PVLDB 15(11), 2022) searches over the four-tuple (U_F, P_F, U_B, P_B) with an estimate
of each. Here the estimate only ranks; what is chosen was lowered, verified and simulated, so its
figures are those of the very schedule that will run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from harmony.errors import ConfigError, DoesNotFitError
from harmony.layergraph import LayerGraph
from harmony.machine import Machine
from harmony.planner.bound import binding
from harmony.planner.build import build_tasks
from harmony.planner.candidates import (
    POLICIES,
    Candidate,
    Question,
    candidates,
    larger_forward,
)
from harmony.planner.cost import CostTable
from harmony.planner.memory import arena_nbytes, host_nbytes, stash_nbytes
from harmony.planner.packing import Budget, Packer, check_layers, suggest_memory
from harmony.planner.passes import lower
from harmony.planner.plan import Plan, describe_spec, plan_phase
from harmony.planner.policy import LEAN, Policy
from harmony.planner.schedule import Schedule
from harmony.planner.simulate import simulate
from harmony.planner.sketch import estimate_step_s
from harmony.planner.tasks import Phase, StepSpec, TaskGraph, TaskKind
from harmony.planner.verify import verify
from harmony.timeline import Timeline
from harmony.units import format_bytes

__all__ = ["Plan", "Policy", "choose", "plan_phase"]

Mode = Literal["auto", "pp", "dp"]
MAX_LOWERED = 6
MAX_REFUSED = 24
"""How many candidates are lowered and fit, and how many are lowered and do not."""

MAX_RUNS_LOWERED = 2500
"""How many Runs all those may have; it bounds the time of a search for a large model."""

CLOSE = 1.03
"""The estimate is about this exact: nothing estimated slower than this is worth lowering."""

WORTHWHILE = 0.97
"""Unequal microbatch sizes must be this much faster: they recompute with other batch sizes."""


@dataclass(frozen=True)
class _Tried:
    """A candidate that was simulated.

    Attributes:
        lowered: tasks and schedule of the phases that make up a step.
        timeline: of the planned phase.
        total_s: seconds of a whole step.
    """

    candidate: Candidate
    lowered: dict[Phase, tuple[TaskGraph, Schedule]]
    timeline: Timeline
    total_s: float


@dataclass(frozen=True)
class _Fitting:
    """A candidate whose schedules, of all phases, were verified."""

    tried: _Tried
    schedules: dict[Phase, Schedule]
    host_nbytes: int


def choose(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    *,
    mode: Mode | str = "auto",
    microbatch_size: int | Literal["auto"] | str = "auto",
    num_packs: int | None = None,
    phase: Phase = Phase.TRAIN,
) -> Plan:
    """Return the fastest plan that fits; the same question always gets the same answer.

    Args:
        phase: ``TRAIN`` for whole steps; ``FORWARD`` or ``BACKWARD`` for the drop-in form, where
            the plan then has schedules for both; ``INFER`` for inference alone.

    Raises:
        ConfigError: if an option makes no sense.
        DoesNotFitError: if no plan fits; it says what does not, by how much, and what to change.
    """
    question = _question(graph, costs, machine, minibatch, mode, microbatch_size, num_packs, phase)
    _check_host(graph, machine)
    search = _Search(question)
    best = search.run()
    return search.plan_of(best)


def _question(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    mode: str,
    size: int | str,
    num_packs: int | None,
    phase: Phase,
) -> Question:
    if minibatch < 1:
        raise ConfigError(f"a minibatch needs at least 1 sample, not {minibatch}")
    if mode not in ("auto", "pp", "dp"):
        raise ConfigError(f'mode is "auto", "pp" or "dp", not {mode!r}')
    if size != "auto" and (not isinstance(size, int) or size < 1):
        raise ConfigError(f'microbatch_size is "auto" or a positive number, not {size!r}')
    if num_packs is not None and not 1 <= num_packs <= graph.num_layers:
        raise ConfigError(f"num_packs is between 1 and {graph.num_layers}, not {num_packs}")
    several = machine.num_devices > 1 and minibatch > 1
    ordered = graph.orders_microbatches()
    if mode == "dp" and several and ordered:
        names = [layer.name for layer in graph.layers if layer.changes_state]
        raise ConfigError(
            f"mode='dp': {names[0]} changes its buffers from microbatch to microbatch, which has "
            "to happen in order. Use mode='pp' or 'auto'"
        )
    # One share is the same step in both modes.
    both = several and not ordered
    modes = ("pp",) if not both else ("pp", "dp") if mode == "auto" else (mode,)
    sizes = (size,) if isinstance(size, int) else None
    return Question(Packer(graph, costs), machine, minibatch, phase, modes, sizes, num_packs)


class _Search:
    """One search, with what was tried so far."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.graph = question.packer.graph
        self.costs = question.packer.costs
        self.outcomes: dict[str, float | str] = {}
        self.closest: tuple[int, str] | None = None

    def run(self) -> _Fitting:
        """Return the fastest candidate that fits.

        Raises:
            DoesNotFitError: if none does.
        """
        found = self._most_promising()
        found += [unequal for tried in found[:1] for unequal in self._unequal(tried)]
        for tried in sorted(found, key=lambda tried: tried.total_s):
            fitting = self._verified(tried)
            if fitting is not None:
                return fitting
        raise self._explain()

    def plan_of(self, best: _Fitting) -> Plan:
        """The plan of a candidate, with everything that people want to know."""
        candidate, timeline = best.tried.candidate, best.tried.timeline
        bound, advice = binding(timeline, best.schedules[candidate.spec.phase], candidate.spec)
        chosen = describe_spec(candidate.spec, candidate.policy)
        others = [item for item in self.outcomes.items() if item[0] != chosen]
        others.sort(key=lambda item: (isinstance(item[1], str), item[1]))
        return Plan(
            mode=candidate.mode,
            minibatch=candidate.spec.minibatch,
            spec=candidate.spec,
            policy=candidate.policy,
            machine=self.question.machine,
            schedules=best.schedules,
            step_s=timeline.step_s,
            peak_nbytes=tuple(timeline.peak_nbytes),
            host_nbytes=best.host_nbytes,
            traffic=timeline.bytes_by(),
            bound=bound,
            advice=advice,
            alternatives=tuple(others),
        )

    def _most_promising(self) -> list[_Tried]:
        """Simulate candidates by estimated time, until the estimates are clearly worse."""
        found: list[_Tried] = []
        refused, lowered, best_s = 0, 0, float("inf")
        for step_s, candidate in self._ranked():
            if len(found) >= MAX_LOWERED or step_s > CLOSE * best_s:
                break
            if found and (refused >= MAX_REFUSED or lowered >= MAX_RUNS_LOWERED):
                break
            if refused >= 4 * MAX_REFUSED:
                break
            lowered += _runs(candidate)
            tried = self._simulated(candidate)
            if tried is None:
                refused += 1
            else:
                found.append(tried)
                best_s = min(best_s, tried.total_s)
        return sorted(found, key=lambda tried: tried.total_s)

    def _unequal(self, best: _Tried) -> list[_Tried]:
        """Variants of the best with U_F > U_B that are clearly faster."""
        found = []
        limit_s = WORTHWHILE * self._estimate_s(best.candidate)
        for candidate in larger_forward(self.question, best.candidate):
            if self._estimate_s(candidate) > CLOSE * limit_s:
                continue
            tried = self._simulated(candidate)
            if tried is not None and tried.total_s < WORTHWHILE * best.total_s:
                found.append(tried)
            elif tried is not None and tried.total_s < best.total_s:
                what = describe_spec(candidate.spec, candidate.policy)
                self.outcomes[what] = "hardly faster, and it recomputes with other batch sizes"
        return found

    def _ranked(self) -> list[tuple[float, Candidate]]:
        """Candidates by estimated time; of those within a percent, the one with fewest Runs."""
        found = [(self._estimate_s(c), c) for c in candidates(self.question)]
        return sorted(found, key=lambda item: (round(100 * math.log(item[0])), _runs(item[1])))

    def _estimate_s(self, candidate: Candidate) -> float:
        packer, machine = self.question.packer, self.question.machine
        phases = _timed_phases(candidate.spec.phase)
        specs = [_for_phase(candidate.spec, phase) for phase in phases]
        parts = [estimate_step_s(packer, machine, spec, candidate.policy) for spec in specs]
        return max(sum(parts), 1e-9)

    def _simulated(self, candidate: Candidate) -> _Tried | None:
        """Lower and simulate a candidate; None if it needs more memory than a GPU has."""
        what = describe_spec(candidate.spec, candidate.policy)
        machine = self.question.machine
        limit = min(device.memory_nbytes for device in machine.devices)
        lowered, timelines = {}, {}
        for phase in _timed_phases(candidate.spec.phase):
            tasks = build_tasks(self.graph, _for_phase(candidate.spec, phase))
            schedule = lower(tasks, machine, candidate.policy)
            lowered[phase] = (tasks, schedule)
            timelines[phase] = simulate(schedule, self.graph, self.costs, machine)
            needed = max(timelines[phase].peak_nbytes)
            if needed > limit:
                self.outcomes[what] = f"needs {format_bytes(needed)} of {format_bytes(limit)}"
                self._note_need(needed, what)
                return None
        total_s = sum(timeline.step_s for timeline in timelines.values())
        self.outcomes[what] = total_s
        return _Tried(candidate, lowered, timelines[candidate.spec.phase], total_s)

    def _verified(self, tried: _Tried) -> _Fitting | None:
        """Check the schedules of all phases of a candidate; None if one does not fit."""
        spec = tried.candidate.spec
        schedules: dict[Phase, Schedule] = {}
        try:
            for phase in _phases(spec.phase):
                if phase in tried.lowered:
                    tasks, schedules[phase] = tried.lowered[phase]
                    verify(schedules[phase], self.graph, self.costs, phase, tasks)
                else:
                    schedules[phase] = self._checked(tried.candidate, phase)
            needed = self._host_nbytes(schedules, spec.phase)
        except DoesNotFitError as error:
            what = describe_spec(spec, tried.candidate.policy)
            self.outcomes[what] = str(error).splitlines()[0]
            return None
        return _Fitting(tried, schedules, needed)

    def _checked(self, candidate: Candidate, phase: Phase) -> Schedule:
        """Lower and verify one phase."""
        tasks = build_tasks(self.graph, _for_phase(candidate.spec, phase))
        schedule = lower(tasks, self.question.machine, candidate.policy)
        try:
            verify(schedule, self.graph, self.costs, phase, tasks)
            return schedule
        except DoesNotFitError:
            if phase is not Phase.INFER or candidate.policy == LEAN:
                raise
        # A training plan is not given up because inference wants more room: it can do with less.
        return self._checked(replace(candidate, policy=LEAN), phase)

    def _host_nbytes(self, schedules: dict[Phase, Schedule], phase: Phase) -> int:
        """Bytes of host memory that all phases together need."""
        needed = host_nbytes(schedules[phase], self.graph)
        if Phase.FORWARD in schedules and Phase.BACKWARD in schedules:
            # What the one stashes stays while the other runs.
            needed -= stash_nbytes(schedules[phase], self.graph)
            both = (schedules[Phase.FORWARD], schedules[Phase.BACKWARD])
            needed += sum(stash_nbytes(schedule, self.graph) for schedule in both)
        limit = self.question.machine.host.memory_nbytes
        if needed > limit:
            raise DoesNotFitError(
                f"needs {format_bytes(needed)} of host memory; the limit is {format_bytes(limit)}."
                " Use a smaller minibatch"
            )
        return needed

    def _note_need(self, needed: int, what: str) -> None:
        """Remember the candidate that needs the least GPU memory."""
        if self.closest is None or needed < self.closest[0]:
            self.closest = (needed, what)

    def _explain(self) -> DoesNotFitError:
        """Say why nothing fits, and what would."""
        question = self.question
        memory = min(device.memory_nbytes for device in question.machine.devices)
        size = min(question.sizes or (1,))
        check_layers(question.packer, size, Budget(memory, POLICIES[-1]))
        limit = f"the limit is {format_bytes(memory)}"
        smaller = "" if size == 1 else "Use a smaller microbatch, or give it"
        remedy = smaller or "Give it"
        refusals = [text for text in self.outcomes.values() if isinstance(text, str)]
        if refusals and self.closest is None:
            return DoesNotFitError(f"no plan fits: {refusals[0]}")
        if self.closest is not None:
            needed, what = self.closest
            return DoesNotFitError(
                f"no plan fits: the closest needs {format_bytes(needed)} on a GPU and {limit}"
                f" ({what}). {remedy} --gpu-memory {suggest_memory(needed)}"
            )
        if question.num_packs is not None:
            return DoesNotFitError(
                f"no plan fits: {question.num_packs} packs are too few for microbatches of"
                f" {size}; {limit}. Leave num_packs out, or use more"
            )
        return DoesNotFitError(f"no plan fits: {limit}. {remedy} more GPU memory")


def _runs(candidate: Candidate) -> int:
    spec = candidate.spec
    forward = len(spec.forward_packs) * len(spec.microbatches(0, TaskKind.FORWARD))
    return forward + len(spec.backward_packs) * len(spec.microbatches(0, TaskKind.BACKWARD))


def _phases(phase: Phase) -> tuple[Phase, ...]:
    """The phases that a plan for one has schedules for."""
    if phase is Phase.TRAIN:
        return Phase.TRAIN, Phase.INFER
    if phase is Phase.INFER:
        return (Phase.INFER,)
    return Phase.FORWARD, Phase.BACKWARD, Phase.INFER


def _timed_phases(phase: Phase) -> tuple[Phase, ...]:
    """The phases that make up a step: the drop-in form runs its two one after the other."""
    if phase in (Phase.TRAIN, Phase.INFER):
        return (phase,)
    return Phase.FORWARD, Phase.BACKWARD


def _for_phase(spec: StepSpec, phase: Phase) -> StepSpec:
    """The same packs and microbatches for another phase."""
    if spec.phase is not Phase.TRAIN or phase is Phase.TRAIN:
        return replace(spec, phase=phase)
    # The last pack of a training step has no FORWARD; here it needs one.
    packs = (*spec.forward_packs, spec.backward_packs[-1])
    size = min(spec.forward_size, spec.backward_size)
    return replace(spec, phase=phase, forward_packs=packs, forward_size=size)


def _check_host(graph: LayerGraph, machine: Machine) -> None:
    """Refuse a model whose parameters alone do not fit into host memory."""
    needed, limit = arena_nbytes(graph), machine.host.memory_nbytes
    if needed > limit:
        raise DoesNotFitError(
            f"parameters, gradients and optimizer state need {format_bytes(needed)} of host"
            f" memory; the limit is {format_bytes(limit)}. Use a machine with more memory"
        )
