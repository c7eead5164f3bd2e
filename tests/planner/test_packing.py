"""Packing: the best partition by brute force, the limits, and the error of a layer too large."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.errors import DoesNotFitError
from harmony.planner.cost import CostTable, LayerCost
from harmony.planner.packing import MAX_CUTS, Budget, Packer, pack_layers, suggest_memory
from harmony.planner.policy import Policy
from harmony.planner.tasks import Pack, TaskKind
from harmony.units import parse_bytes
from tests.toys import MIB, chain, packs, uniform_costs

POLICY = Policy(2, 2, 2)


def uneven(times: list[int]) -> CostTable:
    return CostTable(tuple({1: LayerCost(float(t), 2.0 * t, 0.0, 0, 0, 0)} for t in times))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(1, 4))
def test_the_slowest_pack_is_as_fast_as_can_be(times: list[int], num_packs: int) -> None:
    graph, count = chain(len(times), weight=1), len(times)
    num_packs = min(num_packs, count)
    found = pack_layers(
        graph, uneven(times), TaskKind.FORWARD, 1, Budget(10**12, POLICY), num_packs
    )

    def slowest(partition: tuple[Pack, ...]) -> int:
        return max(sum(times[pack.first : pack.last]) for pack in partition)

    every = [packs(*cut, count) for cut in combinations(range(1, count), num_packs - 1)]
    assert found in every
    assert slowest(found) == min(map(slowest, every))


def test_the_fewest_packs_that_fit() -> None:
    graph = chain(8, weight=MIB, per_sample=0)
    costs = uniform_costs(graph)
    for limit, count in ((34, 1), (33, 1), (18, 2), (10, 4), (5, 8)):
        budget = Budget(limit * MIB, POLICY)
        found = pack_layers(graph, costs, TaskKind.BACKWARD, 1, budget)
        assert len(found) == count, limit
        # FORWARD needs no room for gradients.
        forward = pack_layers(graph, costs, TaskKind.FORWARD, 1, budget)
        assert len(forward) <= len(found)


def test_backward_packs_shrink_with_the_microbatch() -> None:
    graph = chain(8, weight=1000, per_sample=MIB)
    costs = uniform_costs(graph)
    counts = [
        len(pack_layers(graph, costs, TaskKind.BACKWARD, size, Budget(24 * MIB, POLICY)))
        for size in (1, 2, 3)
    ]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_parked_microbatches_take_room() -> None:
    graph = chain(4, weight=1000, per_sample=MIB)
    packer = Packer(graph, uniform_costs(graph))
    lone = packer.need(TaskKind.FORWARD, Pack(0, 2), 1, Budget(MIB, POLICY))
    parked = packer.need(TaskKind.FORWARD, Pack(0, 2), 1, Budget(MIB, POLICY, 8, 8))
    assert parked.values - lone.values == 8 * MIB + 2 * 2 * MIB


def test_a_layer_that_fits_nowhere_is_named_with_its_bytes_and_the_remedy() -> None:
    graph = chain(4, weight=40 * MIB)
    with pytest.raises(DoesNotFitError) as error:
        pack_layers(graph, uniform_costs(graph), TaskKind.BACKWARD, 2, Budget(64 * MIB, POLICY))
    text = str(error.value)
    assert "layer 0 (layer0) alone needs 80.0 MiB (weights and gradients 80.0 MiB" in text
    assert "the limit is 64.0 MiB. Use a microbatch of 1, or give it more GPU memory" in text
    assert "(--gpu-memory 88MiB)" in text


def test_too_few_packs_are_refused() -> None:
    graph = chain(8, weight=MIB)
    with pytest.raises(DoesNotFitError, match="do not fit into 2 packs"):
        pack_layers(
            graph, uniform_costs(graph), TaskKind.BACKWARD, 1, Budget(10 * MIB, POLICY), 2
        )


def test_large_models_are_cut_where_little_crosses() -> None:
    # Within each pair of layers a wide skip crosses; between the pairs it does not.
    count = 300
    graph = chain(count, skips=tuple((i, i + 2) for i in range(0, count - 2, 2)))
    packer = Packer(graph, uniform_costs(graph))
    assert len(packer.cuts) <= MAX_CUTS + 1
    assert packer.cuts[0] == 0 and packer.cuts[-1] == count
    assert all(cut % 2 == 1 for cut in packer.cuts[1:-1])


@given(st.integers(1, 2**40))
def test_suggested_sizes_can_be_typed_and_suffice(nbytes: int) -> None:
    suggested = parse_bytes(suggest_memory(nbytes))
    assert nbytes <= suggested <= max(2**20, 1.25 * nbytes + 2**20)
