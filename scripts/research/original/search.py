"""The best plan in the original's own space of decisions, by its own machine and memory model.

Four-tuples (U_F, P_F, U_B, P_B) of equal microbatches (U divides a GPU's samples), ranked by the
step time without prefetch. Where GPUs do not wait for each other (DP, one GPU) times of tasks add
up, so the plan is found exactly, by dynamic programming, unless updates queue at the end; in a
pipeline balanced packings are found so, and the best of them are improved. `lower_bound_s` is the
least work that any plan of the space does, spread evenly over the GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.tasks import Pack, TaskKind
from research.original.estimator import SERVER, Server, estimate_s
from research.original.four_tuple import FourTuple, Mode
from research.original.improve import Budget, Improver, Pair
from research.original.profile import PaperProfile
from research.original.quick import Question, Quick
from research.original.ranges import Balanced, Ranges, least_sum, walk_back
from research.original.traffic import peak_nbytes

MAX_RANKED = 400
"""Balanced packings that are timed."""

TIMED_PER_LAYER, TIMED_PER_GPU = 50, 15
"""Packings that are timed while they are improved: per layer so many, and so many per GPU more."""

MIN_TIMED = 2500
"""So many for small models, where there are few packings of each pair of sizes."""

NUM_STARTS, STARTS_EACH = 12, 3
"""Balanced packings that are improved, and at most how many of a pair of microbatch sizes."""

NUM_FINAL = 2
"""Of those the ones that are improved further."""

FIRST_SHARE = 0.35
"""The share of what is timed that goes into finding out which those are."""

EXACT = 1.001
"""A plan within this of the bound is left as it is."""

EXTRA_ROUNDS = 1
"""More packs than needed, in tasks for each GPU: smaller packs fill a pipeline faster."""


@dataclass(frozen=True)
class Found:
    """A plan, and what is known about it.

    Attributes:
        plan: the four-tuple.
        step_s: seconds of a step, without prefetch.
        memory_nbytes: peak bytes of a GPU.
        lower_bound_s: no plan of the space takes less.
        num_timed: how many plans were timed.
    """

    plan: FourTuple
    step_s: float
    memory_nbytes: int
    lower_bound_s: float
    num_timed: int


@dataclass(frozen=True)
class _Start:
    """A packing at its microbatch sizes."""

    step_s: float
    sizes: tuple[int, int]
    pair: Pair


def search(
    profile: PaperProfile,
    mode: Mode,
    num_gpus: int,
    minibatch: int,
    memory_nbytes: int,
    server: Server = SERVER,
) -> Found:
    """Return the best four-tuple found.

    Raises:
        PlanError: if GPUs get no equal shares of the minibatch.
        DoesNotFitError: if some layer does not fit with one sample.
    """
    question = Question(profile, mode, num_gpus, minibatch, memory_nbytes, server)
    space = _Space(question)
    bound_s, sums = space.least_work()
    if not sums:
        raise DoesNotFitError(
            f"{profile.model}: some layer does not fit into {format_bytes(memory_nbytes)} with"
            " one sample. Use GPUs with more memory"
        )
    if question.replicated:
        best = space.exact(sums)
        if best.step_s > EXACT * bound_s:
            # Updates queue: fewer of them at the end are worth more work before.
            best = space.improved([best])
    else:
        best = space.improved(space.balanced(bound_s))
        bound_s /= num_gpus
    plan = _plan(question, best)
    return Found(
        plan,
        estimate_s(profile, plan, prefetch=False, server=server),
        round(peak_nbytes(profile, plan)),
        bound_s,
        space.num_timed,
    )


def _plan(question: Question, start: _Start) -> FourTuple:
    forward, backward = start.pair
    return FourTuple(
        question.mode,
        question.num_gpus,
        question.minibatch,
        start.sizes[0],
        tuple(map(Pack, forward, forward[1:])),
        start.sizes[1],
        tuple(map(Pack, backward, backward[1:])),
    )


class _Space:
    """Packs that fit, and what they take, at every microbatch size."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.num_timed = 0
        profile, share = question.profile, question.share
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        self.ranges = {
            kind: {
                size: Ranges(profile, kind, size, question.memory_nbytes)
                for size in sizes
                if size <= largest
            }
            for kind, largest in (
                (TaskKind.FORWARD, profile.max_forward_size),
                (TaskKind.BACKWARD, profile.max_backward_size),
            )
        }
        self.quicks: dict[tuple[int, int], Quick] = {}

    def quick(self, sizes: tuple[int, int]) -> Quick:
        """What times packings at these sizes."""
        if sizes not in self.quicks:
            self.quicks[sizes] = Quick(self.question, *sizes)
        return self.quicks[sizes]

    def lasts(self, size: int) -> list[int]:
        """Where the last BACKWARD pack may begin."""
        ranges = self.ranges[TaskKind.BACKWARD][size]
        return [first for first, row in enumerate(ranges.free) if ranges.num_layers in row]

    def least_work(self) -> tuple[float, list[tuple[float, int, int, int]]]:
        """The least work of a step, and per pair of sizes and last pack its least work.

        Each is the work, U_F, U_B, where the last pack begins; in the order of the work. In a
        pipeline it is the work of all GPUs together. Left out: that packs with many stashes may
        not fit.
        """
        weigh = self.question.work_s
        forward = {
            size: least_sum(ranges, weigh(TaskKind.FORWARD, size))[0]
            for size, ranges in self.ranges[TaskKind.FORWARD].items()
        }
        found = []
        for size, ranges in self.ranges[TaskKind.BACKWARD].items():
            weight = weigh(TaskKind.BACKWARD, size)
            before = least_sum(ranges, weight)[0]
            for first in self.lasts(size):
                work_s = before[first] + weight(first, ranges.num_layers)
                if not first:
                    found.append((work_s, size, size, 0))
                for other, least in forward.items() if first else ():
                    found.append((work_s + least[first], other, size, first))
        found = sorted(row for row in found if row[0] < float("inf"))
        return (found[0][0] if found else 0.0), found

    def exact(self, sums: list[tuple[float, int, int, int]]) -> _Start:
        """The best plan where work adds up: the first whose packs fit with their stashes."""
        best: _Start | None = None
        weigh = self.question.work_s
        for work_s, forward_size, backward_size, first in sums:
            if best is not None and work_s >= best.step_s:
                break
            quick = self.quick((forward_size, backward_size))
            ranges = self.ranges[TaskKind.BACKWARD][backward_size]
            _, came = least_sum(ranges, weigh(TaskKind.BACKWARD, backward_size))
            backward = [*walk_back(came, first), ranges.num_layers]
            forward = [0]
            if first:
                stashes = quick.stash_sums(backward)
                fitting = self.ranges[TaskKind.FORWARD][forward_size].with_stashes(stashes)
                best_s, came = least_sum(fitting, weigh(TaskKind.FORWARD, forward_size))
                if best_s[first] == float("inf"):
                    continue
                forward = walk_back(came, first)
            step_s = quick.step_s(forward, backward)
            self.num_timed += 1
            if best is None or step_s < best.step_s:
                best = _Start(step_s, (forward_size, backward_size), (forward, backward))
        if best is None:
            raise DoesNotFitError("no FORWARD pack fits with its stashes. Use a smaller minibatch")
        return best

    def balanced(self, bound_s: float) -> list[_Start]:
        """Balanced packings in the order of their time: the best of each shape."""
        tables = {
            (kind, size): self._table(kind, size, ranges)
            for kind, by_size in self.ranges.items()
            for size, ranges in by_size.items()
        }
        ranked = sorted(self._combinations(tables))
        found: dict[tuple[int, int, int, int], _Start] = {}
        best_s = float("inf")
        for work_s, *sizes_and_first, num_forward, num_backward in ranked[:MAX_RANKED]:
            if work_s / self.question.num_gpus >= best_s:
                break
            forward_size, backward_size, first = sizes_and_first
            sizes = (forward_size, backward_size)
            backward = tables[TaskKind.BACKWARD, backward_size].packing(num_backward, first)
            backward.append(self.question.profile.num_layers)
            forward = [0]
            if first:
                forward = tables[TaskKind.FORWARD, forward_size].packing(num_forward, first)
            if not self.improver(sizes).fits(forward, backward):
                continue
            step_s = self.quick(sizes).step_s(forward, backward)
            self.num_timed += 1
            shape = (*sizes, num_forward, num_backward)
            if shape not in found or step_s < found[shape].step_s:
                found[shape] = _Start(step_s, sizes, (forward, backward))
            best_s = min(best_s, step_s)
        return sorted(found.values(), key=lambda start: start.step_s)

    def improved(self, starts: list[_Start]) -> _Start:
        """The best plan of a pipeline: the most promising balanced packings, improved."""
        if not starts:
            raise DoesNotFitError("no FORWARD pack fits with its stashes. Use a smaller minibatch")
        question = self.question
        per_layer = TIMED_PER_LAYER + TIMED_PER_GPU * question.num_gpus
        total = max(MIN_TIMED, per_layer * question.profile.num_layers)
        found = self._annealed(_some_each(starts, STARTS_EACH)[:NUM_STARTS], FIRST_SHARE * total)
        found += self._annealed(_some_each(found, 1)[:NUM_FINAL], (1 - FIRST_SHARE) * total)
        self.num_timed += total
        return min(found, key=lambda start: start.step_s)

    def _annealed(self, starts: list[_Start], budget: float) -> list[_Start]:
        """Improve each with its share of a budget; the fastest first."""
        found = []
        for start in starts:
            run = self.improver(start.sizes).anneal
            step_s, pair = run(start.step_s, start.pair, Budget(budget / len(starts)))
            found.append(_Start(step_s, start.sizes, pair))
        return sorted(found, key=lambda start: start.step_s)

    def improver(self, sizes: tuple[int, int]) -> Improver:
        """What improves packings at these sizes."""
        forward = self.ranges[TaskKind.FORWARD].get(sizes[0])
        return Improver(self.quick(sizes), forward, self.ranges[TaskKind.BACKWARD][sizes[1]])

    def _table(self, kind: TaskKind, size: int, ranges: Ranges) -> Balanced:
        weight = self.question.work_s(kind, size)
        fewest = max(count for count in ranges.fewest() if count <= ranges.num_layers)
        most = fewest + EXTRA_ROUNDS * self.question.num_gpus
        return Balanced(ranges, weight, min(most, ranges.num_layers))

    def _combinations(
        self, tables: dict[tuple[TaskKind, int], Balanced]
    ) -> Iterator[tuple[float, int, int, int, int, int]]:
        """Work, U_F, U_B, where the last pack begins, and how many packs each has before it."""
        forwards = self.ranges[TaskKind.FORWARD]
        for size in self.ranges[TaskKind.BACKWARD]:
            table = tables[TaskKind.BACKWARD, size]
            for first in self.lasts(size):
                last_s = table.weights[first][self.question.profile.num_layers]
                if not first:
                    yield last_s, size, size, 0, 0, 0
                    continue
                for number, row in enumerate(table.rows[1:], 1):
                    if row[first][2] < 0:
                        continue
                    work_s = last_s + row[first][1]
                    for other in forwards:
                        rows = tables[TaskKind.FORWARD, other].rows
                        for count in range(1, len(rows)):
                            if rows[count][first][2] >= 0:
                                total = work_s + rows[count][first][1]
                                yield total, other, size, first, count, number


def _some_each(starts: list[_Start], num_each: int) -> list[_Start]:
    """The first ones of each pair of microbatch sizes, in their order."""
    seen: Counter[tuple[int, int]] = Counter()
    found = []
    for start in starts:
        seen[start.sizes] += 1
        if seen[start.sizes] <= num_each:
            found.append(start)
    return found
