"""Ranks candidates by estimated time, coarse first: what could not win is not looked at closely.

For every number of replicas and microbatch size a few packings are estimated, bare and with what
their room can keep. The finer choices (more packings, prefetch depth) are only tried where the
coarse ones came close to the best. A pair of replicas and size is skipped where computing alone,
nothing recomputed, takes longer than something that was found.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.lower_bound import lower_bound
from harmony.planner.search.candidates import (
    POLICIES,
    Candidate,
    Layout,
    Question,
    coinciding,
    finest,
    in_rounds,
    layout,
    packed,
    policies,
)
from harmony.planner.search.estimate import Estimator
from harmony.planner.search.keeping import (
    filled,
    interleaving,
    keeping_products,
    mixing,
    offloading,
    thinning,
)

NEAR = 1.06
"""The finer choices are tried where the coarse ones took at most this times the best."""

ENOUGH = 1.01
"""Nothing finer is tried where the best is as near as this to what no plan can beat."""

KEEPING = (
    POLICIES[0],
    POLICIES[1],
    Policy(2, 2, 1),
    Policy(1, 2, 1),
    replace(LEAN, boundary="keep"),
)
"""Policies of candidates that keep something, with less and less room for what moves."""

RUNS_OF_ROUND = (4, 8, 16, 32, 64)
"""Microbatches of a round that are tried where a step may have several."""

SAMPLES_OF_ROUND = (8, 16)
"""Samples of a round that are tried where rounds are interleaved."""

SHORT = 4
"""Copies of interleaved rounds with fewer microbatches hide less well than they are estimated."""

REFINED = 2
"""How many pairs of replicas and size get the finer choices."""

FEW_RUNS = 10_000
MANY_RUNS = 0.05
"""Lowering a schedule of more Runs than that takes seconds. It must be faster by this share for
each time that they are twice as many."""

MAX_TWINS = 2
"""After so many refusals of candidates with as many packs and slots, the others of those wait."""

STREAMS = 1.035
"""What streams weights that could all stay on the devices must be this much faster than that."""

HEAVY = 1000.0
"""Candidates that the host, or a device, seems to have no room for come last."""

CLOSER = 4
"""Of so many candidates that keep results of products the finer choices are tried."""

MAX_SHRUNK = 6
"""How often candidates that turned out too large are made again with less room."""


class Ranking:
    """All candidates that were estimated.

    Attributes:
        estimator: what estimated them.
        refused: aspect, value and reason of what has no candidate.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self.estimator = Estimator(question)
        self.refused: list[tuple[str, str, str]] = []
        self._known: dict[Candidate, float] = {}
        self._bases: list[Candidate] = []
        self._base: dict[Candidate, tuple[Candidate, int]] = {}
        self._done: set[Candidate] = set()
        self._heavy: set[Candidate] = set()
        self._refusals: Counter[tuple[int, ...]] = Counter()
        self._off: dict[tuple[bool, ...], float] = {}
        self._smaller: set[Candidate] = set()
        self._too_large: set[Candidate] = set()
        self._shrunk = 0
        self._best_s = float("inf")

    def estimates(self) -> list[tuple[float, Candidate]]:
        """What was estimated and may fit, with its seconds by what was learned since."""
        left = [c for c in self._known if c not in self._too_large]
        return [(self._known[c] * self._off.get(family(c), 1.0), c) for c in left]

    def least_host_nbytes(self) -> int | None:
        """Bytes of the host that the least of the candidates need; None if one seems to fit."""
        if self.question.phase is not Phase.TRAIN or self._heavy != self._known.keys():
            return None
        return min(map(self.estimator.host_nbytes, self._known), default=None)

    def any_fits(self) -> bool:
        """Whether any candidate fits, devices and host, as far as an outline tells."""
        question = self.question
        for replicas in question.replicas:
            where = layout(question, replicas)
            for size in reversed(self.estimator.sizes(where)):
                for candidate in (*self._some(where, size), finest(question, where, size)):
                    peak = self.estimator.peak_nbytes(candidate)
                    if peak <= self._memory() and self.estimator.fits_host(candidate):
                        return True
        return False

    def _some(self, where: Layout, size: int) -> Iterator[Candidate]:
        """A few candidates of a layout and size that keep nothing."""
        for policy in policies(self.question, where.ring, few=True):
            yield from packed(self.question, where, size, policy, few=True)

    def fill(self) -> None:
        """Estimate candidates."""
        coarse: list[tuple[float, Layout, int, float]] = []
        if self.question.like is not None:
            self._add(self.question.like)
        for replicas in self.question.replicas:
            where = layout(self.question, replicas)
            for size in self.estimator.sizes(where):
                if self._least_s(where, size) < self._best_s:
                    bare_s, best_s = self._coarse(where, size)
                    if best_s < math.inf:
                        coarse.append((best_s, where, size, bare_s))
                    else:
                        value = f"microbatches of {size}"
                        self.refused.append(("microbatch size", value, "no packing fits"))
        if self._best_s <= ENOUGH * self._bound_s():
            return
        coarse.sort(key=lambda item: (item[0], len(item[1].shares), -item[2]))
        for best_s, where, size, bare_s in coarse[:REFINED]:
            if bare_s <= NEAR * self._best_s:
                self._refine_bare(where, size)
            if best_s <= NEAR * self._best_s:
                self._refine_kept(where, size)

    def fill_selective(self) -> None:
        """Estimate candidates that keep results of products, of the same packings.

        Apart from the others, so that those are looked at as closely as without these.
        """
        if self._best_s <= ENOUGH * self._bound_s():
            return
        # What a policy changes is small beside what is kept; the finer choices vary it.
        bases = {base.spec: base for base in (*self._short(), *reversed(self._bases))}
        best = self._best_for_products(bases.values())
        near = {near.spec: near for base in best[:CLOSER] for near in self._neighbours(base)}
        best = self._best_for_products(near.values())
        for base in best[:CLOSER]:
            self._keep_products(base, self._memory())

    def _best_for_products(self, bases: Iterable[Candidate]) -> list[Candidate]:
        """Candidates that keep nothing, those first that do best with results of products."""
        tried: list[tuple[float, int, Candidate]] = []
        for number, base in enumerate(bases):
            for candidate in self._products_of(base, self._memory(), few=True):
                tried.append((self._fitting(candidate, base, self._memory()), number, base))
        best = [base for _, _, base in sorted(tried, key=lambda item: item[:2])]
        return [*dict.fromkeys(best)]

    def _short(self) -> Iterator[Candidate]:
        """Candidates in rounds of few samples: all that interleaved ones need, of any size."""
        if self.question.machine.num_devices > 1 or self.question.phase is not Phase.TRAIN:
            return
        where = layout(self.question, 1)
        for size in self.estimator.sizes(where):
            runs = {max(1, samples // size) for samples in SAMPLES_OF_ROUND}
            for base in coinciding(self.question, where, size, POLICIES[0]):
                yield from in_rounds(self.question, base, runs)

    def _neighbours(self, base: Candidate) -> Iterator[Candidate]:
        """A candidate, and likes of it with a few packs, or microbatches a round, more or less."""
        yield base
        if self.question.machine.num_devices > 1:
            return
        spec = base.spec
        where = layout(self.question, len(spec.shares))
        count, runs = len(spec.backward_packs), spec.runs_of_round(0)
        counts = {count + more for more in (-2, -1, 0, 1, 2)}
        size = spec.backward_size
        for found in coinciding(self.question, where, size, base.policy, counts):
            if spec.rounds == 1:
                yield found
            else:
                several = {max(1, runs - 1), runs, runs + 1, runs + runs // 2}
                yield from in_rounds(self.question, found, several)

    def _products_of(
        self, base: Candidate, memory_nbytes: int, *, few: bool = False
    ) -> Iterator[Candidate]:
        shape = self.estimator.shape(base)
        for found in keeping_products(self.question, base, shape, memory_nbytes, few=few):
            yield found
            shape = self.estimator.shape(found)
            yield from thinning(self.question, found, shape, few=few)
            yield from interleaving(self.question, found, shape, few=few)

    def _keep_products(self, base: Candidate, memory_nbytes: int) -> None:
        """Estimate what a candidate can keep of results of products, alone and beside others."""
        best_s, best = math.inf, base
        for candidate in self._products_of(base, memory_nbytes):
            seconds = self._fitting(candidate, base, memory_nbytes)
            if seconds < best_s:
                best_s, best = seconds, candidate
        for candidate in mixing(self.question, best, self.estimator.shape(best)):
            self._fitting(candidate, base, memory_nbytes)

    def _bound_s(self) -> float:
        question = self.question
        found = lower_bound(
            question.packer.graph,
            question.packer.costs,
            question.machine,
            question.minibatch,
            question.phase,
        )
        return found.step_s

    def recomputing(self, count: int) -> list[Candidate]:
        """The best candidates that recompute everything."""
        found = [(s, c.num_runs, i, c) for i, (c, s) in enumerate(self._known.items())]
        return [c for *_, c in sorted(found) if not c.spec.kept][:count]

    def promising(self, *, selective: bool = False) -> Iterator[tuple[float, Candidate]]:
        """Candidates that were not handed out yet, best first, also those that `refuse` adds.

        Those that keep results of products, or the others.
        Of those within half a percent the one with fewest Runs comes first. What has as many
        packs and slots as several that did not fit is left out.
        """
        while True:
            left = [c for c in self._known if is_selective(c) is selective]
            left = [c for c in left if c not in self._done and self.may_be_tried(c)]
            if not left:
                return
            found = min(left, key=self._rank)
            self._done.add(found)
            yield self._known[found] * self._factor(found), found

    def learn(self, candidate: Candidate, simulated_s: float) -> None:
        """Note how far off the estimate of a candidate was: that of its likes is as far off."""
        ratio, likes = simulated_s / self.estimator.step_s(candidate), family(candidate)
        self._off[likes] = max(self._off.get(likes, 0.0), ratio)

    def rest(self) -> Iterator[Candidate]:
        """Those that are left, for when memory is short: most frugal policies first, then the
        smallest packs there are.
        """
        left = [c for c in self._known if c not in self._done]
        left.sort(key=lambda c: (c.policy.weight_slots, self._rank(c)))
        for candidate in left[: 2 * MAX_SHRUNK]:
            self._done.add(candidate)
            yield candidate
        if self.question.num_packs in (None, len(self.question.packer.finest)):
            for replicas in self.question.replicas:
                where = layout(self.question, replicas)
                candidate = finest(self.question, where, self.estimator.sizes(where)[-1])
                if candidate in self._done or not self.question.admits(candidate):
                    continue
                if self.estimator.may_fit(candidate):
                    yield candidate

    def refuse(self, candidate: Candidate, needed_nbytes: int) -> None:
        """Note that a candidate is too large; make it again with as much less room as it lacks."""
        self._refusals[_twins(candidate)] += 1
        self._too_large.add(candidate)
        if candidate not in self._base or self._shrunk >= MAX_SHRUNK:
            return
        self._shrunk += 1
        base, memory = self._base[candidate]
        lacking = needed_nbytes - self.question.memory_nbytes
        before = set(self._known)
        keep = self._keep_products if is_selective(candidate) else self._keep
        keep(base, memory - lacking - lacking // 8)
        self._smaller |= self._known.keys() - before

    def may_be_tried(self, candidate: Candidate) -> bool:
        """Whether too few of its likes did not fit to leave it out."""
        return candidate in self._smaller or self._refusals[_twins(candidate)] < MAX_TWINS

    def _rank(self, candidate: Candidate) -> tuple[int, int]:
        factor = 1.0 + MANY_RUNS * max(0.0, math.log2(candidate.num_runs / FEW_RUNS))
        factor *= self._factor(candidate)
        return round(200 * math.log(factor * self._known[candidate])), candidate.num_runs

    def _factor(self, candidate: Candidate) -> float:
        """What an estimate counts for: more if its likes took longer, or the host is too small."""
        factor = self._off.get(family(candidate), 1.0) * handicap(candidate)
        return factor * HEAVY if candidate in self._heavy else factor

    def _least_s(self, where: Layout, size: int) -> float:
        """Seconds that computing takes at least, nothing recomputed."""
        sized = self.question.packer.sized(min(size, where.share))
        whole = sized.forward_s[-1]
        if self.question.phase in (Phase.TRAIN, Phase.BACKWARD):
            whole += sized.backward_s[-1]
        return where.share // size * whole / where.ring

    def _coarse(self, where: Layout, size: int) -> tuple[float, float]:
        """Estimate few candidates of a layout and size.

        Returns:
            The best seconds of those that keep nothing, and of all.
        """
        best_s = math.inf
        for policy in policies(self.question, where.ring, few=True):
            if policy.weight_slots == LEAN.weight_slots and best_s < math.inf:
                break
            for candidate in packed(self.question, where, size, policy, few=True):
                best_s = min(best_s, self._add(candidate))
        bare_s = best_s
        if self.question.phase in (Phase.TRAIN, Phase.BACKWARD):
            for base in coinciding(self.question, where, size, POLICIES[0]):
                for each in (base, *in_rounds(self.question, base, RUNS_OF_ROUND[1::2])):
                    best_s = min(best_s, self._keep(each, self._memory(), few=True))
        return bare_s, best_s

    def _refine_bare(self, where: Layout, size: int) -> None:
        for policy in policies(self.question, where.ring):
            for candidate in packed(self.question, where, size, policy):
                self._add(candidate)

    def _refine_kept(self, where: Layout, size: int) -> None:
        if self.question.phase not in (Phase.TRAIN, Phase.BACKWARD):
            return
        counts = self._good_counts(where, size)
        for policy in KEEPING:
            for base in coinciding(self.question, where, size, policy, counts):
                for each in (base, *in_rounds(self.question, base, RUNS_OF_ROUND)):
                    self._keep(each, self._memory())

    def _good_counts(self, where: Layout, size: int) -> set[int]:
        """Numbers of packs around the best that a layout and size was tried with."""
        tried = [
            (seconds, len(c.spec.backward_packs))
            for c, seconds in self._known.items()
            if c.spec.shares == where.shares and c.spec.backward_size == size
        ]
        best = min(tried)[1]
        step = max(where.ring, best // 4 // where.ring * where.ring)
        return {best, best - step, best + step, best + 2 * step}

    def _memory(self) -> int:
        return self.question.memory_nbytes

    def _keep(self, base: Candidate, memory_nbytes: int, *, few: bool = False) -> float:
        """Estimate what a candidate can keep; return the best seconds."""
        best_s, best = self._add(base), base
        self._bases.append(base)
        shape = self.estimator.forward_shape(base)
        for candidate in filled(self.question, base, shape, memory_nbytes):
            seconds = self._fitting(candidate, base, memory_nbytes)
            if seconds < best_s:
                best_s, best = seconds, candidate
        for kept in dict.fromkeys((best,) if few else (best, base)):
            for candidate in offloading(self.question, kept, few=few):
                best_s = min(best_s, self._fitting(candidate, base, memory_nbytes))
        return best_s

    def _fitting(self, candidate: Candidate, base: Candidate, memory_nbytes: int) -> float:
        """Estimate a candidate if it fits; infinity if not."""
        estimator = self.estimator
        if candidate not in self._known:
            if not self.question.admits(candidate) or not estimator.fits_host(candidate):
                return math.inf
            if estimator.peak_nbytes(candidate) > memory_nbytes:
                return math.inf
            self._note(candidate, estimator.step_s(candidate))
        self._base[candidate] = (base, memory_nbytes)
        return self._known[candidate]

    def _add(self, candidate: Candidate) -> float:
        """Estimate a candidate that keeps nothing; infinity if it hardly fits."""
        if candidate not in self._known:
            estimator = self.estimator
            if not self.question.admits(candidate):
                return math.inf
            fits_host = self.question.phase is not Phase.TRAIN or estimator.fits_host(candidate)
            if not fits_host or not estimator.may_fit(candidate):
                # The estimate is close, but the plan has the last word, and words for the error.
                self._heavy.add(candidate)
            self._note(candidate, estimator.step_s(candidate))
        return math.inf if candidate in self._heavy else self._known[candidate]

    def _note(self, candidate: Candidate, seconds: float) -> None:
        self._known[candidate] = seconds
        if candidate not in self._heavy:
            self._best_s = min(self._best_s, seconds)


def handicap(candidate: Candidate) -> float:
    """How much longer a candidate counts for than it takes, where it streams weights."""
    return 1.0 if len(candidate.policy.resident) == len(candidate.spec.backward_packs) else STREAMS


def is_selective(candidate: Candidate) -> bool:
    """Whether it is one of those that are looked at once all others have been."""
    return bool(candidate.spec.products) or candidate.spec.interleaved


def _twins(candidate: Candidate) -> tuple[int, ...]:
    """What candidates have in common that mostly fit together, or do not."""
    spec, policy = candidate.spec, candidate.policy
    counts = len(spec.shares), spec.backward_size, len(spec.backward_packs), spec.rounds
    return (*counts, policy.weight_slots, bool(spec.products), spec.interleaved)


def family(candidate: Candidate) -> tuple[bool, ...]:
    """Candidates that are estimated too low or too high together."""
    spec, policy = candidate.spec, candidate.policy
    return (
        len(spec.shares) > 1,
        bool(spec.saved),
        bool(spec.saved_runs),
        bool(spec.products),
        bool(policy.offload),
        bool(policy.resident),
        handicap(candidate) == 1.0,
        policy.mirror,
        spec.rounds > 1,
        spec.interleaved,
        spec.interleaved and spec.runs_of_round(0) < SHORT,
    )
