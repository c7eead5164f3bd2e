"""The search in the original's space: exact where times add up, never worse than the original."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.errors import DoesNotFitError, PlanError
from harmony.planner.ir.tasks import Pack
from harmony.planner.search.search import choose
from harmony.profiling.original_format import to_layers
from research.original.estimator import estimate_s
from research.original.four_tuple import FourTuple, Mode
from research.original.improve import neighbour, neighbours
from research.original.machine import machine_of
from research.original.profile import PaperProfile, parse_profile
from research.original.search import search
from research.original.tables import CaseRow, Profiles, read_cases
from research.original.traffic import peak_nbytes

DATA = Path(__file__).parents[1] / "data" / "reference"
PROFILES = Profiles(DATA / "profiles")
CASES = read_cases(DATA / "search_results.csv")
MIB = 2**20


def made(random: Random, num_layers: int) -> PaperProfile:
    """A profile of layers that differ, measured at sizes 1 and 4."""

    def some(low: int, high: int) -> list[int]:
        return [random.randint(low, high) * MIB for _ in range(num_layers)]

    weights, entered, saved = some(20, 200), some(1, 20), some(10, 80)
    forward = [random.uniform(0.02, 0.1) for _ in range(num_layers)]
    sizes = (1, 4)
    forward_s = {str(u): [u**0.9 * s for s in forward] for u in sizes}
    data = {
        "model": "made",
        "R": num_layers,
        "W": weights,
        "B": [0] * num_layers,
        "K": weights,
        "X_per_sample": entered,
        "upd_cpu_s": [nbytes / 5e9 for nbytes in weights],
        "time_s_FWD": forward_s,
        "time_s_BWD": {u: [3 * s for s in times] for u, times in forward_s.items()},
    }
    for name, copies in (("FWD", 1), ("BWD", 2)):
        data[f"mem_bytes_{name}"] = {
            str(u): [
                copies * w + u * (x + copies * s)
                for w, x, s in zip(weights, entered, saved, strict=True)
            ]
            for u in sizes
        }
    return parse_profile(data)


def packings(end: int) -> Iterator[tuple[Pack, ...]]:
    for count in range(end):
        for inner in combinations(range(1, end), count):
            yield tuple(Pack(a, b) for a, b in pairwise((0, *inner, end)))


def all_plans(
    profile: PaperProfile, mode: Mode, num_gpus: int, minibatch: int
) -> Iterator[FourTuple]:
    share = minibatch // num_gpus if mode == "DP" else minibatch
    sizes = [size for size in (1, 2, 4) if share % size == 0]
    for backward in packings(profile.num_layers):
        last = backward[-1].first
        for backward_size in sizes:
            for forward in packings(last) if last else [()]:
                for forward_size in sizes if last else [backward_size]:
                    yield FourTuple(
                        mode, num_gpus, minibatch, forward_size, forward, backward_size, backward
                    )


def best_of_all(
    profile: PaperProfile, mode: Mode, num_gpus: int, minibatch: int, memory: int
) -> float:
    plans = all_plans(profile, mode, num_gpus, minibatch)
    fitting = (plan for plan in plans if peak_nbytes(profile, plan) <= memory)
    return min(estimate_s(profile, plan, prefetch=False) for plan in fitting)


@settings(max_examples=8, derandomize=True)
@given(seed=st.integers(0, 10**6), num_gpus=st.sampled_from([1, 2]))
def test_data_parallel_plans_are_the_best_of_all(seed: int, num_gpus: int) -> None:
    profile = made(Random(seed), 5)
    found = search(profile, "DP", num_gpus, 4, 900 * MIB)
    best_s = best_of_all(profile, "DP", num_gpus, 4, 900 * MIB)
    # Only updates that wait for each other, and stashes, part the sum from the step.
    assert found.lower_bound_s <= best_s * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= found.step_s <= 1.002 * best_s


@settings(max_examples=5, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_pipelines_of_small_models_are_nearly_the_best_of_all(seed: int) -> None:
    profile = made(Random(seed), 4)
    found = search(profile, "PP", 2, 4, 900 * MIB)
    best_s = best_of_all(profile, "PP", 2, 4, 900 * MIB)
    assert found.lower_bound_s <= best_s * (1 + 1e-9)
    assert best_s * (1 - 1e-9) <= found.step_s <= 1.02 * best_s


@pytest.mark.parametrize("case", [c for c in CASES if c.mode == "DP"], ids=str)
def test_data_parallel_cases_are_never_worse_and_near_their_bound(case: CaseRow) -> None:
    found = checked(case)
    assert found <= case.best_s + 0.0005


PIPELINES = [c for c in CASES if c.mode == "PP" and c.model in ("gpt2_xl", "bert_large")]


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_pipelines_are_never_worse_than_the_originals(case: CaseRow) -> None:
    assert checked(case) <= case.best_s


def checked(case: CaseRow) -> float:
    """Search; check what the search says of its plan."""
    profile = PROFILES[case.model]
    question = (case.mode, case.num_gpus, case.minibatch, case.memory_nbytes)
    found = search(profile, *question)
    plan = found.plan
    plan.check(profile.num_layers)
    assert found.step_s == estimate_s(profile, plan, prefetch=False)
    assert found.memory_nbytes == round(peak_nbytes(profile, plan)) <= case.memory_nbytes
    assert found.lower_bound_s <= found.step_s * (1 + 1e-9)
    assert plan.share % plan.forward_size == plan.share % plan.backward_size == 0
    return found.step_s


def test_the_same_question_gets_the_same_plan() -> None:
    profile = PROFILES["gpt2_10b"]
    first, second = (search(profile, "PP", 2, 32, 9 * 10**9) for _ in range(2))
    assert first == second


def test_more_memory_is_never_worse_where_the_search_is_exact() -> None:
    profile = PROFILES["gpt2_xl"]
    times = [search(profile, "DP", 4, 64, size * 10**9).step_s for size in (6, 8, 10, 14)]
    assert times == sorted(times, reverse=True)


def test_what_fits_into_one_pack_is_one_pack() -> None:
    found = search(made(Random(1), 4), "DP", 1, 4, 10**11)
    assert found.plan.backward_packs == (Pack(0, 4),)
    assert found.plan.forward_packs == ()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="some layer does not fit"):
        search(made(Random(1), 4), "PP", 2, 4, 10 * MIB)
    with pytest.raises(PlanError, match="3 GPUs get no equal shares of 4 samples"):
        search(made(Random(1), 4), "DP", 3, 4, 10**10)


def test_our_planner_takes_the_originals_models_and_server() -> None:
    profile = PROFILES["bert_large"]
    graph, costs = to_layers(profile)
    machine = machine_of(2, 9 * 10**9)
    plan = choose(graph, costs, machine, 32)
    assert plan.bound_s <= plan.step_s
    assert max(plan.peak_nbytes) <= 9 * 10**9
    assert machine.switches[0].devices == (0, 1)
    assert machine.switches[0].h2d_bytes_per_s == machine.devices[0].h2d_bytes_per_s
    assert machine_of(1, 10**9).switches == ()


def is_packing(cuts: list[int], end: int) -> bool:
    return cuts[0] == 0 and cuts[-1] == end and all(a < b for a, b in pairwise(cuts))


@given(seed=st.integers(0, 10**6), data=st.data())
def test_neighbours_are_packings_of_the_same_layers(seed: int, data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(2, 9))
    backward = [*sorted(data.draw(st.sets(st.integers(1, num_layers - 1)))), num_layers]
    backward = [0, *backward]
    last = backward[-2]
    inner = data.draw(st.sets(st.integers(1, last - 1))) if last > 1 else set()
    forward = [0, *sorted(inner), last] if last else [0]
    random = Random(seed)
    found = list(neighbours(forward, backward))
    found += [o for o in (neighbour(forward, backward, random) for _ in range(50)) if o]
    for other_forward, other_backward in found:
        assert is_packing(other_backward, num_layers)
        assert is_packing(other_forward, other_backward[-2])
        assert (other_forward, other_backward) != (forward, backward)
