"""Questions to the planner: the smallest minibatch that hides transfers, the largest model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.machine import Host, Machine
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.predict.memory import arena_nbytes
from harmony.planner.search.questions import (
    Block,
    hidden_share,
    largest_model,
    repeat,
    repeated_block,
    smallest_minibatch,
)
from harmony.planner.search.search import ask, choose
from tests.toys import MIB, chain, server, uniform_costs

MODEL = chain(12, weight=2 * MIB, per_sample=16 * 1024)
COSTS = uniform_costs(MODEL)


def slow(rate: float, host: int = 1024) -> Machine:
    return replace(server(1, memory=24 * MIB, rate=rate), host=Host(host * MIB))


def test_the_smallest_minibatch_hides_its_transfers_and_a_smaller_one_does_not() -> None:
    machine = slow(2.5e8)
    answer = smallest_minibatch(MODEL, COSTS, machine)
    assert answer.value > 2
    assert answer.plan.minibatch == answer.value
    assert hidden_share(ask(MODEL, COSTS, machine, answer.value)) >= 0.95
    assert hidden_share(ask(MODEL, COSTS, machine, answer.value // 2)) < 0.95


def test_faster_links_hide_smaller_minibatches() -> None:
    sizes = [smallest_minibatch(MODEL, COSTS, slow(rate)).value for rate in (1e8, 1e9, 1e11)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def test_no_minibatch_hides_activations_that_outgrow_the_links() -> None:
    with pytest.raises(DoesNotFitError, match="even with minibatches of 8 samples"):
        smallest_minibatch(MODEL, COSTS, slow(1e6), most=8)
    with pytest.raises(ConfigError, match="most is at least 1"):
        smallest_minibatch(MODEL, COSTS, slow(1e6), most=0)


def test_the_repeated_block_is_found() -> None:
    assert repeated_block(MODEL) == Block(1, 1, 10)  # the first reads samples, the last makes 4 B
    pairs = replace(
        MODEL,
        layers=tuple(replace(layer, signature="ab"[layer.index % 2]) for layer in MODEL.layers),
    )
    assert repeated_block(pairs) == Block(1, 2, 5)
    apart = replace(MODEL, layers=tuple(replace(x, signature=str(x.index)) for x in MODEL.layers))
    with pytest.raises(ConfigError, match="no part of this model repeats"):
        repeated_block(apart)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 25])
def test_a_repeated_model_is_a_model_of_its_own(count: int) -> None:
    block = repeated_block(MODEL)
    graph, costs = repeat(MODEL, COSTS, block, count)
    assert graph.num_layers == len(costs.by_layer) == count + 2
    assert [layer.index for layer in graph.layers] == list(range(count + 2))
    assert [value.id for value in graph.values] == list(range(count + 3))
    assert all(graph.values[i].consumers == (i,) for i in range(count + 2))
    assert graph.loss == count + 2
    choose(graph, costs, slow(1e9), 2)


def test_a_model_repeated_as_often_as_before_is_the_same() -> None:
    graph, _ = repeat(MODEL, COSTS, repeated_block(MODEL), 10)
    assert graph.fingerprint == MODEL.fingerprint


def test_the_largest_model_fits_and_one_block_more_does_not() -> None:
    machine = slow(1e9, host=200)
    answer = largest_model(MODEL, COSTS, machine, 4)
    assert answer.plan.host_nbytes <= machine.host.memory_nbytes
    larger, _ = repeat(MODEL, COSTS, repeated_block(MODEL), answer.value + 1)
    assert arena_nbytes(larger) > machine.host.memory_nbytes - 8 * MIB
    assert arena_nbytes(answer.graph) <= machine.host.memory_nbytes
    assert answer.value > largest_model(MODEL, COSTS, slow(1e9, host=100), 4).value


def test_a_model_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(DoesNotFitError):
        largest_model(MODEL, COSTS, slow(1e9, host=4), 4)
