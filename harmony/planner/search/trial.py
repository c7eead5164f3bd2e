"""Lowers, simulates and verifies a candidate: the figures of the very schedule that will run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.check.verify import check_together, verify
from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec, TaskGraph
from harmony.planner.lower.passes import in_the_same_slots, lower
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.memory import Workspace, device_peak, host_nbytes, stash_nbytes
from harmony.planner.predict.simulate import Simulation
from harmony.planner.search.candidates import Candidate, Question

FEW_ROUNDS = 3
"""So many rounds of a step are lowered to find out what one of more of them takes."""


@dataclass(frozen=True)
class Lowered:
    """A phase of a candidate, with what is predicted of it.

    Attributes:
        peak_nbytes: of each device.
    """

    tasks: TaskGraph
    schedule: Schedule
    peak_nbytes: tuple[int, ...]
    simulation: Simulation


@dataclass(frozen=True)
class Tried:
    """A candidate that was lowered, fits the devices, and was simulated.

    Attributes:
        lowered: the phases that make up a step; empty where only some of its many rounds were.
        summed_s: then, seconds of a whole step, from those of some rounds.
    """

    candidate: Candidate
    lowered: dict[Phase, Lowered]
    summed_s: float = 0.0

    @cached_property
    def total_s(self) -> float:
        """Predicted seconds of a whole step."""
        return self.summed_s + sum(phase.simulation.step_s for phase in self.lowered.values())


@dataclass(frozen=True)
class Fitting:
    """A candidate whose schedules, of all phases, were verified."""

    tried: Tried
    schedules: dict[Phase, Schedule]
    timeline: Timeline
    host_nbytes: int


@dataclass(frozen=True)
class TooLarge:
    """A candidate that was lowered and does not fit the devices: the bytes that it needs."""

    nbytes: int


class Trial:
    """Tries the candidates of one question."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.graph = question.packer.graph
        self.costs = question.packer.costs
        self.workspace = Workspace(self.graph, self.costs)

    def tried(self, candidate: Candidate) -> Tried | TooLarge:
        """Lower a candidate, and simulate it if it fits.

        Of one with many rounds only the first few: from then on each takes as long as the one
        before, and the same memory.
        """
        times, spec = [], candidate.spec
        if tried_runs(candidate) == candidate.num_runs:
            return self._whole(candidate)
        few = _few_rounds(spec)
        for rounds in (few - 1, few):
            found = self._whole(replace(candidate, spec=spec.first_rounds(rounds)))
            if isinstance(found, TooLarge):
                return found
            times.append(found.total_s)
        more_s = (spec.rounds - few) * (times[1] - times[0])
        return Tried(candidate, {}, times[1] + more_s)

    def _whole(self, candidate: Candidate) -> Tried | TooLarge:
        lowered, machine = {}, self.question.machine
        phases = timed_phases(candidate.spec.phase)
        made = [build_tasks(self.graph, for_phase(candidate.spec, phase)) for phase in phases]
        alone = [
            lower(tasks, machine, policy_for(candidate.policy, phase))
            for phase, tasks in zip(phases, made, strict=True)
        ]
        schedules = in_the_same_slots(alone)
        needed = [self._needed(schedule) for schedule in schedules]
        if not candidate.spec.kept and _largest(needed) > self.question.memory_nbytes:
            # Nothing stays from one to the other, so each may have slots of its own.
            schedules, needed = alone, [self._needed(schedule) for schedule in alone]
        if _largest(needed) > self.question.memory_nbytes:
            return TooLarge(_largest(needed))
        for phase, tasks, schedule, peaks in zip(phases, made, schedules, needed, strict=True):
            simulation = Simulation(schedule, self.graph, self.costs, machine)
            lowered[phase] = Lowered(tasks, schedule, peaks, simulation)
        return Tried(candidate, lowered)

    def _needed(self, schedule: Schedule) -> tuple[int, ...]:
        """Bytes that a schedule takes of each device."""
        return tuple(
            device_peak(schedule, device, self.graph, self.workspace).nbytes
            for device in range(schedule.num_devices)
        )

    def verified(self, tried: Tried) -> Fitting:
        """Check the schedules of a candidate.

        Raises:
            DoesNotFitError: if one does not fit, or the host is too small for all of them.
        """
        if not tried.lowered:
            whole = self._whole(tried.candidate)
            if isinstance(whole, TooLarge):  # no round takes more than those that were tried
                raise DoesNotFitError(f"needs {format_bytes(whole.nbytes)} on a GPU")
            tried = whole
        phase = tried.candidate.spec.phase
        schedules = {each: found.schedule for each, found in tried.lowered.items()}
        needed = self._host_nbytes(schedules, phase)
        for each, found in tried.lowered.items():
            verify(found.schedule, self.graph, self.costs, each, found.tasks)
        if phase is Phase.BACKWARD and tried.candidate.spec.kept:
            check_together(schedules[Phase.FORWARD], schedules[Phase.BACKWARD])
            self._check_recomputing(tried.candidate, schedules)
        chosen = tried.lowered[phase]
        timeline = chosen.simulation.timeline(labels=False, peak_nbytes=chosen.peak_nbytes)
        return Fitting(tried, schedules, timeline, needed)

    def _check_recomputing(
        self, candidate: Candidate, schedules: Mapping[Phase, Schedule]
    ) -> None:
        """Make sure of the backward that finds nothing kept.

        Raises:
            DoesNotFitError: if it does not fit.
        """
        spec, policy = recomputing(candidate.spec, candidate.policy)
        tasks, beside = build_tasks(self.graph, spec), schedules.values()
        checked_schedule(tasks, self.costs, self.question.machine, policy, beside)

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


def tried_runs(candidate: Candidate) -> int:
    """FORWARD and BACKWARD tasks that are lowered to find out what a candidate takes."""
    some, rounds = 2 * _few_rounds(candidate.spec) - 1, candidate.spec.rounds
    return candidate.num_runs * some // rounds if rounds > some else candidate.num_runs


def _few_rounds(spec: StepSpec) -> int:
    """So many that one more adds a round like all that follow."""
    return FEW_ROUNDS + 1 if spec.interleaved else FEW_ROUNDS


def timed_phases(phase: Phase) -> tuple[Phase, ...]:
    """The phases that make up a step: an own loop runs its two one after the other.

    A plan has schedules for those; `inference_schedule` makes one more when somebody wants it.
    """
    if phase in (Phase.TRAIN, Phase.INFER):
        return (phase,)
    return Phase.FORWARD, Phase.BACKWARD


def for_phase(spec: StepSpec, phase: Phase) -> StepSpec:
    """The same packs and microbatches for another phase."""
    if spec.phase is phase:
        return spec
    if spec.phase is not Phase.TRAIN or phase is Phase.TRAIN:
        return replace(_keeping_nothing(spec) if phase is Phase.INFER else spec, phase=phase)
    # The last pack of a training step has no FORWARD; here it needs one.
    packs = (*spec.forward_packs, spec.backward_packs[-1])
    size = min(spec.forward_size, spec.backward_size)
    return replace(
        _keeping_nothing(spec),
        phase=phase,
        forward_packs=packs,
        forward_size=size,
        rounds=1,
        interleaved=False,
    )


def _largest(needed: Iterable[Sequence[int]]) -> int:
    return max(max(peaks) for peaks in needed)


def _keeping_nothing(spec: StepSpec) -> StepSpec:
    return replace(spec, saved=(), saved_runs=0, products=(), products_runs=0)


def recomputing(spec: StepSpec, policy: Policy) -> tuple[StepSpec, Policy]:
    """The same packs and microbatches with nothing kept for the backward."""
    return _keeping_nothing(spec), replace(policy, offload=())


def policy_for(policy: Policy, phase: Phase) -> Policy:
    """The same choices for another phase.

    Weights stay in whole training steps, and those that stay between steps in inference too;
    activations stay where a backward follows.
    """
    if phase is Phase.TRAIN:
        return policy
    if phase is Phase.INFER:
        return replace(policy, hold=0, offload=(), mirror=False)
    return replace(policy, hold=0, resident=())


def inference_schedule(
    graph: LayerGraph, costs: CostTable, machine: Machine, spec: StepSpec, policy: Policy
) -> Schedule:
    """Return the schedule of inference with the packs and microbatches of a plan, checked.

    Where the plan's policy leaves too little room, it does with less: what it needs beside the
    weights that stay on the devices is less than training does.

    Raises:
        DoesNotFitError: if that is still too much, as with outputs that are wider than anything.
    """
    wanted = policy_for(policy, Phase.INFER)
    tasks = build_tasks(graph, for_phase(spec, Phase.INFER))
    try:
        return checked_schedule(tasks, costs, machine, wanted)
    except DoesNotFitError:
        lean = replace(LEAN, resident=wanted.resident)
        try:
            return checked_schedule(tasks, costs, machine, lean)
        except DoesNotFitError as error:
            why = str(error).splitlines()[0]
            raise DoesNotFitError(
                f"inference does not fit with the plan of this minibatch: {why}. Use a smaller"
                " minibatch for it"
            ) from None


def checked_schedule(
    tasks: TaskGraph,
    costs: CostTable,
    machine: Machine,
    policy: Policy,
    beside: Iterable[Schedule] = (),
) -> Schedule:
    """Return the schedule of some tasks, checked.

    Args:
        beside: what takes turns with it, and has slots large enough for both.

    Raises:
        ScheduleError: if the checker refuses it.
        DoesNotFitError: if a device needs more memory than it has.
    """
    schedule, others = lower(tasks, machine, policy), list(beside)
    if in_the_same_slots(others) == others:  # else each has slots of its own, for want of memory
        schedule = in_the_same_slots([schedule, *others])[0]
    verify(schedule, tasks.layers, costs, tasks.spec.phase, tasks)
    return schedule
