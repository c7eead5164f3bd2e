"""The order in which candidates are tried, and what it learns from those that were simulated."""

from __future__ import annotations

from itertools import pairwise

import pytest

from harmony.planner.search.candidates import Candidate
from harmony.planner.search.ranking import Ranking, family
from harmony.planner.search.search import ask
from tests.toys import MIB, chain, server, uniform_costs

MODEL = chain(8, weight=2 * MIB, per_sample=64 * 1024)


def estimated() -> Ranking:
    """All candidates for eight layers on two GPUs."""
    machine = server(2, memory=20 * MIB, rate=2e8)
    ranking = Ranking(ask(MODEL, uniform_costs(MODEL), machine, 8))
    ranking.fill()
    return ranking


def tried(ranking: Ranking) -> dict[Candidate, float]:
    """The candidates that a ranking still has, as they come, with what their seconds count for."""
    return {candidate: seconds for seconds, candidate in ranking.promising()}


def test_the_best_estimate_comes_first_and_each_candidate_once() -> None:
    ranking = estimated()
    found = list(ranking.promising())
    candidates = [candidate for _, candidate in found]
    assert len(set(candidates)) == len(found) > 10
    assert set(candidates) == {candidate for _, candidate in ranking.estimates()}
    seconds = [seconds for seconds, _ in found]
    # Of those within half a percent the one with fewest Runs comes first.
    assert all(b >= 0.99 * a for a, b in pairwise(seconds))
    assert seconds[-1] > 2 * seconds[0]


@pytest.mark.parametrize(("off", "worst"), [([2.0], 2.0), ([0.5], 0.5), ([1.5, 3.0, 1.2], 3.0)])
def test_candidates_count_as_much_more_as_the_worst_of_their_likes_took(
    off: list[float], worst: float
) -> None:
    as_estimated, ranking = tried(estimated()), estimated()
    estimates = {candidate: seconds for seconds, candidate in ranking.estimates()}
    first = next(candidate for _, candidate in ranking.promising())
    for factor in off:
        ranking.learn(first, factor * estimates[first])
    counted = tried(ranking)
    alike = [c for c in counted if family(c) == family(first)]
    others = counted.keys() - alike
    assert alike and others
    assert all(counted[c] == pytest.approx(worst * as_estimated[c]) for c in alike)
    assert all(counted[c] == as_estimated[c] for c in others)
