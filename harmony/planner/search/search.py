"""Chooses the plan: estimates every candidate, lowers the promising, keeps the fastest that fits.

The paper (PVLDB 15(11), 2022) searches over the four-tuple (U_F, P_F, U_B, P_B) with an estimate
of each. Here the estimate only ranks; what is chosen was lowered, verified and simulated, so its
figures are those of the very schedule that will run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Literal

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.options import ACTIVATIONS, MODES
from harmony.core.units import format_bytes
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.ir.plan import Decision, Plan, describe_spec
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.bottleneck import bottleneck
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.lower_bound import lower_bound
from harmony.planner.predict.memory import arena_nbytes
from harmony.planner.search.candidates import (
    POLICIES,
    REMEDY,
    Candidate,
    Question,
    larger_forward,
    one_replica,
    replicas_of,
    sizes_that_work,
)
from harmony.planner.search.decisions import decide, without_choice
from harmony.planner.search.keeping import knows_products
from harmony.planner.search.overlap import with_late_updates
from harmony.planner.search.packing import Budget, Packer, check_layers, suggest_memory
from harmony.planner.search.ranking import ENOUGH, Ranking, family, handicap, is_selective
from harmony.planner.search.trial import Fitting, TooLarge, Trial, Tried, tried_runs

__all__ = ["Plan", "Policy", "choose"]

Mode = Literal["auto", "pp", "dp"]
MAX_LOWERED = 12
MAX_ALIKE = 3
"""How many candidates are lowered and fit, in all and of one family: near twins are estimated
alike, and would leave no room for others that turn out faster."""

MAX_SELECTIVE = 2
"""How many of those that keep results of products are lowered beside them, one of a packing."""

MAX_REFUSED = 12
"""How many candidates are lowered and do not fit, before what needs least is tried."""

RUNS_LOWERED = 7000
"""How many Runs all that is lowered and fits has, about; it bounds the time of a search."""

SELECTIVE_SHARE = 0.25
"""How much of that what keeps results of products may have more."""

LONG_S = 30.0
MOST_RUNS_LOWERED = 28_000
"""Where a step takes longer than that, so many more Runs, up to this, are worth the time."""

SURPRISED = 3
"""How many times as many they may have while something is estimated to be clearly faster."""

FRUGAL = 3
"""How many of those that need least are compared, where nothing promising fits."""

MOST_SAMPLES = 2**30
"""Of a minibatch: trying its divisors, and its microbatches, takes time."""

UNEQUAL = 3
"""Of how many candidates that recompute everything unequal microbatch sizes are tried."""

CLOSE = 1.03
"""The estimate is about this exact: nothing estimated slower than this is worth lowering."""

CLEARLY = 1.2
"""Host memory is refused by the estimate where that is so much over the limit."""

WORTHWHILE = 0.97
"""Unequal microbatch sizes must be this much faster: they recompute with other batch sizes."""


def choose(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    *,
    mode: Mode | str = "auto",
    microbatch_size: int | Literal["auto"] | str = "auto",
    num_packs: int | None = None,
    replicas: int | None = None,
    activations: str = "auto",
    phase: Phase = Phase.TRAIN,
    like: Plan | Candidate | None = None,
) -> Plan:
    """Return the fastest plan that fits; the same question always gets the same answer.

    Args:
        mode: ``"pp"``: one pipeline; ``"dp"``: a replica on each device; ``"auto"``: either, or
            several replicas with a pipeline each.
        replicas: so many, whatever ``mode`` says.
        activations: ``"auto"``, or ``"recompute"`` to keep and offload none.
        phase: ``TRAIN`` for whole steps; ``FORWARD`` or ``BACKWARD`` for loops of one's own, where
            the plan then has schedules for both; ``INFER`` for inference alone.
        like: a way to train the same minibatch, the bits of which this one computes too (see
            `harmony.planner.search.numerics`), whatever mode, microbatch_size and replicas say.

    Raises:
        ConfigError: if an option makes no sense.
        DoesNotFitError: if no plan fits; it says what does not, by how much, and what to change.
    """
    question = ask(
        graph,
        costs,
        machine,
        minibatch,
        mode=mode,
        microbatch_size=microbatch_size,
        num_packs=num_packs,
        replicas=replicas,
        activations=activations,
        phase=phase,
        like=like,
    )
    _check_host(graph, machine)
    search = _Search(question)
    try:
        best = search.run()
    except DoesNotFitError as error:
        if microbatch_size != "auto" or not graph.whole_batch:
            raise
        raise DoesNotFitError(
            f"{error}. The {minibatch} samples have to be one microbatch: {graph.whole_batch}."
            f" {REMEDY}"
        ) from None
    leaves = machine.updates_overlap and phase is Phase.TRAIN
    return _with_late_updates(search, best) if leaves else search.plan_of(best)


def _with_late_updates(search: _Search, best: Fitting) -> Plan:
    """Return the plan with the updates that are left to the next step.

    They hide behind a whole forward where rounds are not interleaved, else behind less: where the
    best plan's are, the best of the others is asked, too.
    """
    plan = with_late_updates(search.plan_of(best), best, search.trial)
    if not best.tried.candidate.spec.interleaved:
        return plan
    search = _Search(replace(search.question, interleaves=False))
    try:
        best = search.run()
    except DoesNotFitError:
        return plan
    other = with_late_updates(search.plan_of(best), best, search.trial)
    return min(plan, other, key=lambda plan: plan.step_s)


def ask(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    *,
    mode: str = "auto",
    microbatch_size: int | str = "auto",
    num_packs: int | None = None,
    replicas: int | None = None,
    activations: str = "auto",
    phase: Phase = Phase.TRAIN,
    like: Plan | Candidate | None = None,
) -> Question:
    """Return what `choose` is asked, its options checked.

    Raises:
        ConfigError: if an option makes no sense.
    """
    size = microbatch_size
    if minibatch < 1:
        raise ConfigError(f"a minibatch needs at least 1 sample, not {minibatch}")
    if minibatch > MOST_SAMPLES:
        raise ConfigError(f"a minibatch has at most {MOST_SAMPLES} samples, not {minibatch}")
    if mode not in MODES:
        raise ConfigError(f'mode is "auto", "pp" or "dp", not {mode!r}')
    if size != "auto" and (not isinstance(size, int) or size < 1):
        raise ConfigError(f'microbatch_size is "auto" or a positive number, not {size!r}')
    if activations not in ACTIVATIONS:
        raise ConfigError(f'activations is "auto" or "recompute", not {activations!r}')
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
    counts = replicas_of(mode, machine.num_devices, minibatch, ordered=ordered)
    sizes: tuple[int, ...] | None = (size,) if isinstance(size, int) else None
    if isinstance(size, int) and mode == "auto":  # no replica may have smaller microbatches
        counts = tuple(r for r in counts if r == 1 or minibatch % (r * size) == 0)
    if sizes is None and (graph.whole_batch or graph.sizes):
        if several and (mode == "dp" or (replicas or 1) > 1):
            raise ConfigError(one_replica(graph, minibatch, mode))
        counts, sizes = (1,), sizes_that_work(graph, minibatch)
    if replicas is not None:
        counts = (replicas,)
    recompute = activations == "recompute"
    packer = Packer(graph, costs)
    model = None
    if like is not None:
        model = Candidate(like.mode, replace(like.spec, late=()), like.policy)
        counts, sizes = (len(like.spec.shares),), (like.spec.backward_size,)
    return Question(packer, machine, minibatch, phase, counts, sizes, num_packs, recompute, model)


class _Search:
    """One search, with what was tried so far."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.graph = question.packer.graph
        self.trial = Trial(question)
        self.ranking = Ranking(question)
        self.outcomes: dict[str, float | str] = {}
        self.simulated: dict[Candidate, float] = {}
        self.closest: tuple[int, str] | None = None
        self.alike: Counter[tuple[bool, ...]] = Counter()

    def run(self) -> Fitting:
        """Return the fastest candidate that fits.

        Raises:
            DoesNotFitError: if none does.
        """
        self.ranking.fill()
        self._refuse_small_host()
        found = self._most_promising([])
        if not found:
            # What fits by all means is the time to beat for what was not tried.
            found = self._most_promising(self._frugal())
        like = self.question.like
        if knows_products(self.question) and (found or (like and is_selective(like))):
            self.ranking.fill_selective()
            found = self._most_promising(found, selective=True)
        found += [unequal for tried in found[:1] for unequal in self._unequal(tried)]
        fitting = self._fastest(found)
        if fitting is None and found:
            # They fit the devices, but not the host.
            fitting = self._fastest(self._frugal(short_of_host=True))
        if fitting is None:
            raise self._explain()
        return fitting

    def _fastest(self, found: list[Tried]) -> Fitting | None:
        """The fastest of some that passes the checker and fits the host."""
        for tried in sorted(found, key=_counted_s):
            fitting = self._verified(tried)
            if fitting is not None:
                return fitting
        return None

    def _frugal(self, *, short_of_host: bool = False) -> list[Tried]:
        """Simulate candidates that need little memory, until a few fit."""
        found: list[Tried] = []
        for candidate in self.ranking.rest():
            if short_of_host and not self.ranking.estimator.fits_host(candidate):
                continue
            tried = self._simulated(candidate)
            found += [] if tried is None else [tried]
            if len(found) >= FRUGAL:
                break
        return found

    def plan_of(self, best: Fitting) -> Plan:
        """The plan of a candidate, with the explanation shown to users."""
        candidate, timeline = best.tried.candidate, best.timeline
        spec, question = candidate.spec, self.question
        bound, advice = bottleneck(timeline, best.schedules[spec.phase], spec)
        chosen = describe_spec(spec, candidate.policy)
        others = [item for item in self.outcomes.items() if item[0] != chosen]
        others.sort(key=lambda item: (isinstance(item[1], str), item[1]))
        bounds = lower_bound(
            self.graph, question.packer.costs, question.machine, question.minibatch, spec.phase
        )
        return Plan(
            mode=candidate.mode,
            minibatch=spec.minibatch,
            spec=spec,
            policy=candidate.policy,
            machine=question.machine,
            schedules=best.schedules,
            step_s=timeline.step_s,
            peak_nbytes=tuple(timeline.peak_nbytes),
            host_nbytes=best.host_nbytes,
            traffic=timeline.bytes_by(),
            bound=bound,
            advice=advice,
            alternatives=tuple(others),
            model=self.graph.fingerprint,
            bound_s=bounds.step_s,
            bound_reason=bounds.reason,
            decisions=self._decisions(best),
        )

    def _decisions(self, best: Fitting) -> tuple[Decision, ...]:
        """What was decided, and why; what the model leaves no choice of, too."""
        found = decide(
            best.tried.candidate,
            best.tried.total_s,
            self.ranking.estimates(),
            self.simulated,
            self.ranking.refused,
            lambda candidate: self._why_not(candidate, best.tried.candidate),
        )
        is_whole = self.question.sizes == (self.question.minibatch,)
        return without_choice(found, self.graph.whole_batch) if is_whole else found

    def _why_not(self, candidate: Candidate, chosen: Candidate) -> str:
        """Why a candidate that is estimated, or simulated, to be faster was not chosen."""
        if handicap(candidate) > handicap(chosen):
            share = 100 * (handicap(candidate) - 1)
            return f"streaming weights must be {share:.1f} % faster than keeping them"
        if candidate in self.simulated:
            return self._outcome_of(candidate)
        if not self.ranking.may_be_tried(candidate):
            return "plans with as many packs and slots do not fit"
        if not self.ranking.estimator.may_fit(candidate):
            return "it hardly fits"
        if self.alike[family(candidate)] >= MAX_ALIKE:
            return f"{MAX_ALIKE} plans like it were simulated and are not faster"
        if tried_runs(candidate) > RUNS_LOWERED // 2:
            return f"working out its {candidate.num_runs} tasks would take too long"
        return "the estimate is not more exact than that"

    def _outcome_of(self, candidate: Candidate) -> str:
        """What came of a candidate that fits the GPUs."""
        found = self.outcomes[describe_spec(candidate.spec, candidate.policy)]
        return found if isinstance(found, str) else "it recomputes with other batch sizes"

    def _most_promising(self, found: list[Tried], *, selective: bool = False) -> list[Tried]:
        """Simulate candidates by estimated time, until the estimates are clearly worse.

        Args:
            found: what was simulated before.
            selective: of the candidates that keep results of products, a few more.
        """
        found, best_s = list(found), min(map(_counted_s, found), default=math.inf)
        self.alike = alike = Counter(family(tried.candidate) for tried in found)
        lowered, refused = 0, 0
        most = len(found) + MAX_SELECTIVE if selective else MAX_LOWERED
        close = ENOUGH if selective else CLOSE
        packings: set[tuple[object, ...]] = set()
        for step_s, candidate in self.ranking.promising(selective=selective):
            if len(found) >= most or step_s > close * best_s or refused >= MAX_REFUSED:
                break
            if alike[family(candidate)] >= MAX_ALIKE:
                continue
            spec = candidate.spec
            packing = (spec.backward_packs, spec.backward_size, spec.shares, spec.rounds)
            if selective and (packing, spec.interleaved) in packings:
                continue
            # An estimate that turned out far too low must not be what the search ends with.
            more = SURPRISED if step_s < WORTHWHILE * best_s else 1
            room = _budget(best_s) * (SELECTIVE_SHARE if selective else 1)
            if found and lowered + tried_runs(candidate) > more * room:
                continue
            tried = self._simulated(candidate)
            if tried is None:
                refused += 1
                continue
            packings.add((packing, spec.interleaved))
            lowered += tried_runs(candidate)
            alike[family(candidate)] += 1
            found.append(tried)
            best_s = min(best_s, _counted_s(tried))
        return sorted(found, key=_counted_s)

    def _unequal(self, best: Tried) -> list[Tried]:
        """Variants with U_F > U_B, of the best and of those that recompute, clearly faster."""
        found = []
        limit_s = WORTHWHILE * self.ranking.estimator.step_s(best.candidate)
        bases = dict.fromkeys([best.candidate, *self.ranking.recomputing(UNEQUAL)])
        for candidate in (c for base in bases for c in larger_forward(self.question, base)):
            if not self.ranking.estimator.may_fit(candidate):
                continue
            if self.ranking.estimator.step_s(candidate) > CLOSE * limit_s:
                continue
            tried = self._simulated(candidate)
            if tried is not None and tried.total_s < WORTHWHILE * best.total_s:
                found.append(tried)
            elif tried is not None and tried.total_s < best.total_s:
                what = describe_spec(candidate.spec, candidate.policy)
                self.outcomes[what] = "hardly faster, and it recomputes with other batch sizes"
        return found

    def _simulated(self, candidate: Candidate) -> Tried | None:
        """Lower and simulate a candidate; None if it needs more memory than a GPU has."""
        what = describe_spec(candidate.spec, candidate.policy)
        tried = self.trial.tried(candidate)
        if isinstance(tried, TooLarge):
            limit = format_bytes(self.question.memory_nbytes)
            self.outcomes[what] = f"needs {format_bytes(tried.nbytes)} of {limit}"
            if self.closest is None or tried.nbytes < self.closest[0]:
                self.closest = (tried.nbytes, what)
            self.ranking.refuse(candidate, tried.nbytes)
            return None
        self.outcomes[what] = self.simulated[candidate] = tried.total_s
        self.ranking.learn(candidate, tried.total_s)
        return tried

    def _verified(self, tried: Tried) -> Fitting | None:
        try:
            return self.trial.verified(tried)
        except DoesNotFitError as error:
            what = describe_spec(tried.candidate.spec, tried.candidate.policy)
            self.outcomes[what] = str(error).splitlines()[0]
            return None

    def _refuse_small_host(self) -> None:
        """Refuse what the host is clearly too small for, before anything is lowered.

        Raises:
            DoesNotFitError: with the bytes of the candidate that needs the fewest.
        """
        least = self.ranking.least_host_nbytes()
        limit = self.question.machine.host.memory_nbytes
        if least is not None and least > CLEARLY * limit:
            raise DoesNotFitError(
                f"no plan fits: needs about {format_bytes(least)} of host memory; the limit is"
                f" {format_bytes(limit)}. Use a smaller minibatch"
            )

    def _explain(self) -> DoesNotFitError:
        """Say why nothing fits, and what would."""
        question = self.question
        memory = min(device.memory_nbytes for device in question.machine.devices)
        size = min(*(question.sizes or (1,)), question.minibatch)
        check_layers(question.packer, size, Budget(memory, POLICIES[-1]))
        limit = f"the limit is {format_bytes(memory)}"
        smaller = "" if size == 1 else "Use a smaller microbatch, or give it"
        remedy = smaller or "Give it"
        refusals = [text for text in self.outcomes.values() if isinstance(text, str)]
        # One that fits the devices says more than the many that do not.
        hosts = [text for text in refusals if not text.startswith("needs") or "host" in text]
        if hosts:
            return DoesNotFitError(f"no plan fits: {hosts[0]}")
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


def _budget(step_s: float) -> float:
    """How many Runs may be lowered in all, where the best step so far takes so many seconds."""
    return min(MOST_RUNS_LOWERED, RUNS_LOWERED * max(1.0, step_s / LONG_S))


def _counted_s(tried: Tried) -> float:
    """Seconds of a step, and more where weights stream that need not."""
    return tried.total_s * handicap(tried.candidate)


def _check_host(graph: LayerGraph, machine: Machine) -> None:
    """Refuse a model whose parameters alone do not fit into host memory."""
    needed, limit = arena_nbytes(graph), machine.host.memory_nbytes
    if needed > limit:
        raise DoesNotFitError(
            f"parameters, gradients and optimizer state need {format_bytes(needed)} of host"
            f" memory; the limit is {format_bytes(limit)}. Use a machine with more memory, "
            "train less of the model (LoRA: a frozen parameter takes 2 bytes in bf16), or an "
            "optimizer with less state"
        )
