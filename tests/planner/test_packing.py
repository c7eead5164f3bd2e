"""Packing: the best partition by brute force, the limits, and the error of a layer too large."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.core.layergraph import LayerGraph
from harmony.core.units import parse_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, TaskKind
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.packing import MAX_CUTS, Budget, Packer, check_layers, suggest_memory
from tests.toys import MIB, chain, packs, uniform_costs

POLICY = Policy(2, 2, 2)


def uneven(times: list[int]) -> CostTable:
    return CostTable(tuple({1: LayerCost(float(t), 2.0 * t, 0.0, 0, 0, 0)} for t in times))


def partition(
    graph: LayerGraph,
    costs: CostTable,
    kind: TaskKind,
    size: int,
    budget: Budget,
    count: int | None = None,
) -> tuple[Pack, ...]:
    """The best packs: the fewest that fit, or so many."""
    table = Packer(graph, costs).table(kind, size, budget)
    found = table.packs(graph.num_layers, count or table.fewest(graph.num_layers) or 0)
    assert found is not None
    return found


@settings(max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(1, 4))
def test_the_slowest_pack_is_as_fast_as_can_be(times: list[int], num_packs: int) -> None:
    graph, count = chain(len(times), weight=1), len(times)
    num_packs = min(num_packs, count)
    found = partition(graph, uneven(times), TaskKind.FORWARD, 1, Budget(10**12, POLICY), num_packs)

    def slowest(parts: tuple[Pack, ...]) -> int:
        return max(sum(times[pack.first : pack.last]) for pack in parts)

    every = [packs(*cut, count) for cut in combinations(range(1, count), num_packs - 1)]
    assert found in every
    assert slowest(found) == min(map(slowest, every))


def test_the_fewest_packs_that_fit() -> None:
    graph = chain(8, weight=MIB, per_sample=0)
    costs = uniform_costs(graph)
    for limit, count in ((34, 1), (33, 1), (18, 2), (10, 4), (5, 8)):
        budget = Budget(limit * MIB, POLICY)
        found = partition(graph, costs, TaskKind.BACKWARD, 1, budget)
        assert len(found) == count, limit
        # FORWARD needs no room for gradients.
        forward = partition(graph, costs, TaskKind.FORWARD, 1, budget)
        assert len(forward) <= len(found)


def test_backward_packs_shrink_with_the_microbatch() -> None:
    graph = chain(8, weight=1000, per_sample=MIB)
    costs = uniform_costs(graph)
    counts = [
        len(partition(graph, costs, TaskKind.BACKWARD, size, Budget(24 * MIB, POLICY)))
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
        check_layers(Packer(graph, uniform_costs(graph)), 2, Budget(64 * MIB, POLICY))
    text = str(error.value)
    assert "layer 0 (layer0) alone needs 80.0 MiB (weights and gradients 80.0 MiB" in text
    assert "the limit is 64.0 MiB. Use a microbatch of 1, or give it more GPU memory" in text
    assert "(--gpu-memory 88MiB)" in text


def test_too_few_packs_do_not_fit() -> None:
    graph = chain(8, weight=MIB)
    table = Packer(graph, uniform_costs(graph)).table(
        TaskKind.BACKWARD, 1, Budget(10 * MIB, POLICY)
    )
    fewest = table.fewest(8)
    assert fewest is not None and fewest > 2
    assert table.packs(8, 2) is None and table.packs(8, fewest) is not None


def test_large_models_are_cut_where_little_crosses() -> None:
    # Within each pair of layers a wide skip crosses; between the pairs it does not.
    count = 1600
    graph = chain(count, skips=tuple((i, i + 2) for i in range(0, count - 2, 2)))
    packer = Packer(graph, uniform_costs(graph))
    assert len(packer.cuts) <= MAX_CUTS + 1
    assert packer.cuts[0] == 0 and packer.cuts[-1] == count
    assert all(cut % 2 == 1 for cut in packer.cuts[1:-1])


@given(st.integers(1, 2**40))
def test_suggested_sizes_can_be_typed_and_suffice(nbytes: int) -> None:
    suggested = parse_bytes(suggest_memory(nbytes))
    assert nbytes <= suggested <= max(2**20, 1.25 * nbytes + 2**20)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=2, max_size=7),
    st.integers(1, 7),
    st.integers(10, 60),
)
def test_under_a_memory_limit_too_no_partition_that_fits_is_faster(
    layers: list[tuple[int, int]], num_packs: int, limit: int
) -> None:
    # Values of any size: what enters a pack may shrink as the pack grows.
    graph, count = chain(len(layers), weight=MIB), len(layers)
    values = tuple(
        replace(v, nbytes_per_sample=layers[v.id % count][1] * MIB) for v in graph.values
    )
    graph, costs = replace(graph, values=values), uneven([seconds for seconds, _ in layers])
    packer, budget = Packer(graph, costs), Budget(limit * MIB, POLICY)
    table = packer.table(TaskKind.BACKWARD, 1, budget)
    num_packs = min(num_packs, count)

    def fits(pack: Pack) -> bool:
        return packer.need(TaskKind.BACKWARD, pack, 1, budget).nbytes <= budget.memory_nbytes

    def slowest(parts: tuple[Pack, ...]) -> float:
        return max(packer.seconds(TaskKind.BACKWARD, pack, 1) for pack in parts)

    def every(number: int) -> list[tuple[Pack, ...]]:
        found = (packs(*cut, count) for cut in combinations(range(1, count), number - 1))
        return [partition for partition in found if all(map(fits, partition))]

    found = table.packs(count, num_packs)
    if not every(num_packs):
        assert found is None
    else:
        assert found in every(num_packs)
        assert slowest(found) == pytest.approx(min(map(slowest, every(num_packs))))
    numbers = [number for number in range(1, count + 1) if every(number)]
    assert table.fewest(count) == (numbers[0] if numbers else None)
    assert table.most(count) == (numbers[-1] if numbers else None)


@given(st.integers(0, 7), st.integers(1, 8), st.integers(1, 4))
def test_bytes_of_ranges_are_those_of_the_graph(first: int, length: int, size: int) -> None:
    graph = chain(8, tied=True, skips=((0, 3), (2, 6)), frozen=(1, 4))
    layers = tuple(replace(x, saved_nbytes_per_sample=100 + x.index) for x in graph.layers)
    graph = replace(graph, layers=layers)
    pack = Pack(first, min(8, first + length))
    packer, each = Packer(graph, uniform_costs(graph)), range(pack.first, pack.last)
    assert packer.ranges.weights(pack.first, pack.last) == graph.weight_nbytes(each)
    assert packer.ranges.gradients(pack.first, pack.last) == graph.gradient_nbytes(each)
    assert packer.saved_nbytes(pack, size) == graph.saved_nbytes(pack.first, pack.last, size)

    def nbytes(values: tuple[int, ...]) -> int:
        return sum(graph.values[v].nbytes(size) for v in values)

    assert packer.boundary_nbytes(pack, size) == (
        nbytes(graph.pack_inputs(pack.first, pack.last)),
        nbytes(graph.pack_outputs(pack.first, pack.last)),
    )
    facts = packer.facts(pack, size)
    assert (facts.inputs, facts.outputs) == packer.boundary_nbytes(pack, size)
    assert facts.forward_s + facts.backward_s == packer.seconds(TaskKind.BACKWARD, pack, size)
