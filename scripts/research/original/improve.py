"""Packings made better step by step: what `ranges` cannot optimise exactly.

Where packs take turns on several GPUs, a step's time depends on which GPU waits for which, so no
sum over packs tells it. From balanced packings on, cuts are shifted one by one or in groups,
dropped and added: at random, slower ones too at first (annealing), then as long as it helps (a
descent). Random numbers come from a generator with a fixed seed: the same question gets the same
answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import exp
from random import Random

from research.original.quick import Quick
from research.original.ranges import Ranges

Cuts = list[int]
Pair = tuple[Cuts, Cuts]
"""Places of FORWARD packs, and of BACKWARD packs."""

HOT, COLD = 0.008, 0.0003
"""How much longer a step, as a share, is taken with a probability of 1/e at first and at last."""

ANNEALED = 0.8
"""The share of a budget that goes into annealing; the rest is for the descent."""

CHECKED = 0.25
"""What a packing that does not fit costs of a budget, where timing one costs 1."""


@dataclass
class Budget:
    """How many packings may still be timed."""

    left: float

    def spend(self) -> bool:
        """Whether there is one more."""
        self.left -= 1
        return self.left >= 0


class Improver:
    """Packings of one question at one pair of microbatch sizes."""

    def __init__(self, quick: Quick, forward: Ranges | None, backward: Ranges) -> None:
        self.quick = quick
        self.forward = forward
        self.backward = backward

    def fits(self, forward: Cuts, backward: Cuts) -> bool:
        """Whether all packs fit, what FORWARD packs stash included."""
        free = self.backward.free
        for first, last in pairwise(backward):
            if last not in free[first]:
                return False
        if len(forward) < 2 or self.forward is None:
            return len(forward) < 2
        stashed, size = self.quick.stash_sums(backward), self.forward.num_samples
        free = self.forward.free
        for first, last in pairwise(forward):
            if free[first].get(last, -1.0) < size * (stashed[last] - stashed[first]):
                return False
        return True

    def descend(self, best_s: float, pair: Pair, budget: Budget) -> tuple[float, Pair]:
        """Take what is faster until nothing is, or the budget is spent."""
        improved = True
        while improved:
            improved = False
            for other in neighbours(*pair):
                if not self.fits(*other):
                    continue
                if not budget.spend():
                    return best_s, pair
                step_s = self.quick.step_s(*other)
                if step_s < best_s * (1 - 1e-9):
                    best_s, pair, improved = step_s, other, True
                    break
        return best_s, pair

    def anneal(self, best_s: float, pair: Pair, budget: Budget) -> tuple[float, Pair]:
        """Random changes, worse ones less and less often, then a descent.

        Simulated annealing (Kirkpatrick, Gelatt, Vecchi: Science 220, 1983).
        """
        random = Random(0)
        now_s, now, best = best_s, pair, pair
        total = ANNEALED * budget.left
        stop = budget.left - total
        while budget.left > stop:
            done = 1 - (budget.left - stop) / total
            heat_s = best_s * HOT * (COLD / HOT) ** done
            other = neighbour(*now, random)
            if other is None or not self.fits(*other):
                budget.left -= CHECKED
                continue
            budget.left -= 1
            step_s = self.quick.step_s(*other)
            if step_s < now_s or random.random() < exp((now_s - step_s) / heat_s):
                now_s, now = step_s, other
                if step_s < best_s:
                    best_s, best = step_s, other
        return self.descend(best_s, best, budget)


def neighbours(forward: Cuts, backward: Cuts) -> Iterator[Pair]:
    """All packings one change away, in a fixed order."""
    yield from _shifted(forward, backward)
    for other in _regrouped(forward, len(forward) - 1):
        yield other, backward
    for other in _regrouped(backward, len(backward) - 2):
        yield forward, other


def _shifted(forward: Cuts, backward: Cuts) -> Iterator[Pair]:
    """One cut elsewhere; where the last BACKWARD pack begins, FORWARD ends."""
    steps = (-1, 1, -2, 2)
    for other in _moved(backward[:-1], steps):
        yield forward, [*other, backward[-1]]
    if len(forward) > 1:
        for step in steps:
            place = backward[-2] + step
            if max(backward[-3], forward[-2]) < place < backward[-1]:
                yield [*forward[:-1], place], [*backward[:-2], place, backward[-1]]
    for other in _moved(forward, steps):
        yield other, backward


def _moved(cuts: Cuts, steps: tuple[int, ...]) -> Iterator[Cuts]:
    for at in range(1, len(cuts) - 1):
        for step in steps:
            if cuts[at - 1] < cuts[at] + step < cuts[at + 1]:
                yield [*cuts[:at], cuts[at] + step, *cuts[at + 1 :]]


def _regrouped(cuts: Cuts, stop: int) -> Iterator[Cuts]:
    """A cut less, a cut more, or several moved together, among the first ``stop`` packs."""
    for at in range(1, stop):
        yield [*cuts[:at], *cuts[at + 1 :]]
    for at in range(stop):
        if cuts[at + 1] - cuts[at] > 1:
            yield [*cuts[: at + 1], (cuts[at] + cuts[at + 1]) // 2, *cuts[at + 1 :]]
    for at in range(1, stop):
        for step in (-1, 1):
            middle = [cut + step for cut in cuts[at:stop]]
            if cuts[at - 1] < middle[0] and middle[-1] < cuts[stop]:
                yield [*cuts[:at], *middle, *cuts[stop:]]


def neighbour(forward: Cuts, backward: Cuts, random: Random) -> Pair | None:
    """A packing one random change away; None if the change that was drawn is impossible."""
    kind = random.random()
    if kind < 0.75:
        return _shift_some(forward, backward, random, 1 + int(random.random() * 4 * (kind < 0.3)))
    # The last BACKWARD pack is left whole, as FORWARD ends where it begins.
    num_forward, num_backward = len(forward) - 1, len(backward) - 2
    at = int(random.random() * (num_forward + num_backward))
    cuts, at = (forward, at) if at < num_forward else (backward, at - num_forward)
    stop = num_forward if cuts is forward else num_backward
    if kind < 0.87:
        other = [*cuts[:at], *cuts[at + 1 :]] if 0 < at < stop else None
    elif at < stop and cuts[at + 1] - cuts[at] > 1:
        place = cuts[at] + 1 + int(random.random() * (cuts[at + 1] - cuts[at] - 1))
        other = [*cuts[: at + 1], place, *cuts[at + 1 :]]
    else:
        other = None
    if other is None:
        return None
    return (other, backward) if cuts is forward else (forward, other)


def _shift_some(forward: Cuts, backward: Cuts, random: Random, num_cuts: int) -> Pair | None:
    """A cut, or some that follow each other, one layer further or nearer."""
    num_forward = max(0, len(forward) - 2)
    at = int(random.random() * (num_forward + len(backward) - 2))
    step = 1 if random.random() < 0.5 else -1
    cuts, at = (forward, at + 1) if at < num_forward else (backward, at - num_forward + 1)
    stop = len(cuts) - (1 if cuts is forward else 2)
    if at >= stop:
        place = backward[-2] + step
        if len(backward) < 3 or not max(backward[-3], forward[-2]) < place < backward[-1]:
            return None
        return [*forward[:-1], place], [*backward[:-2], place, backward[-1]]
    end = min(at + num_cuts, stop)
    middle = [cut + step for cut in cuts[at:end]]
    if not cuts[at - 1] < middle[0] or not middle[-1] < cuts[end]:
        return None
    other = [*cuts[:at], *middle, *cuts[end:]]
    return (other, backward) if cuts is forward else (forward, other)
