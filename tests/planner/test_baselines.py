"""What other systems move and take: by hand, closed forms, and what always holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Device, Host, Machine
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.predict.cost import CostTable, LayerCost
from research.baselines.baselines import balanced_stages, fastest, one_forward_one_backward
from research.baselines.swapping import swap_step
from research.baselines.zero3 import zero3_step
from tests.toys import chain

WEIGHT = 1000
LAYERS = 6


def machine(num_devices: int, memory: int, rate: float = 1000.0) -> Machine:
    device = Device("toy", memory, rate, rate, rate, update_bytes_per_s=1e12)
    return Machine((device,) * num_devices, Host(10**9, accumulate_bytes_per_s=1e12))


def model(saved: int = 0) -> tuple[LayerGraph, CostTable]:
    graph = chain(LAYERS, weight=WEIGHT, per_sample=0)
    layers = tuple(replace(layer, state_nbytes=0) for layer in graph.layers)
    cost = LayerCost(1.0, 2.0, 0.5, 0, saved, 0)
    graph = replace(graph, layers=layers)
    return graph, CostTable(tuple({1: cost} for _ in range(LAYERS)))


@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_swapping_under_dp_moves_the_weights_as_often_as_the_papers_closed_form_says(
    num_devices: int, num_microbatches: int
) -> None:
    """(4m+2)N|W|, but for the layers that are still there when the order turns round.

    That is one after each forward, one after each backward: the next microbatch or the update
    begins with the layer that the backward ended with.
    """
    graph, costs = model()
    tight = machine(num_devices, 2 * WEIGHT + 100)  # one layer's weights and gradients
    minibatch = num_devices * num_microbatches
    outcome = swap_step(
        graph, costs, tight, minibatch, 1, "dp", recompute=True, always_writes=True
    )
    accesses = (2 * num_microbatches + 1) * LAYERS - 2 * num_microbatches
    assert outcome.nbytes("weights") == 2 * accesses * WEIGHT * num_devices
    formula = (4 * num_microbatches + 2) * num_devices * graph.weight_nbytes()
    assert outcome.nbytes("weights") == formula - 4 * num_microbatches * WEIGHT * num_devices


def test_a_pipeline_that_swaps_moves_them_once_for_all_gpus() -> None:
    graph, costs = model()
    tight = machine(2, 2 * WEIGHT + 100)
    outcome = swap_step(graph, costs, tight, 4, 1, "pp", recompute=True, always_writes=True)
    assert outcome.nbytes("weights") <= (4 * 4 + 2) * graph.weight_nbytes()
    assert outcome.nbytes("weights") >= 0.6 * (4 * 4 + 2) * graph.weight_nbytes()


def test_what_fits_stays_and_nothing_is_swapped() -> None:
    graph, costs = model(saved=10)
    for mode in ("dp", "pp"):
        for recompute in (False, True):
            roomy = machine(2, 100 * WEIGHT)
            outcome = swap_step(graph, costs, roomy, 4, 1, mode, recompute=recompute)  # type: ignore[arg-type]
            assert outcome.swap_nbytes == 0
            assert outcome.step_s >= outcome.bound_s


def test_only_what_changed_is_written_unless_everything_is() -> None:
    graph, costs = model()
    tight = machine(1, 2 * WEIGHT + 100)
    lazy = swap_step(graph, costs, tight, 2, 1, "dp", recompute=True)
    eager = swap_step(graph, costs, tight, 2, 1, "dp", recompute=True, always_writes=True)
    # Weights change in the update only.
    assert lazy.traffic["d2h", "weights"] == graph.weight_nbytes()
    assert eager.traffic["d2h", "weights"] == eager.traffic["h2d", "weights"]


def test_one_gpu_by_hand() -> None:
    """Room for one layer and its gradients, a second a copy, and all of it on access.

    16 fetches of weights: each access but two, which find what the one before has left. The
    gradients of 5 layers go out and come back; those of the first are still there in its update.
    Weights that the update has changed go out when the next layer comes. Nothing is hidden.
    """
    graph, costs = model()
    tight = machine(1, 2 * WEIGHT)
    values = tuple(replace(v, nbytes_per_sample=0) for v in graph.values)
    outcome = swap_step(replace(graph, values=values), costs, tight, 1, 1, "dp", recompute=False)
    assert outcome.traffic["h2d", "weights"] == 16 * WEIGHT
    assert outcome.traffic["d2h", "weights"] == 6 * WEIGHT
    assert outcome.traffic["h2d", "gradients"] == outcome.traffic["d2h", "gradients"] == 5 * WEIGHT
    assert outcome.bound_s == 16 + 5
    assert outcome.step_s == pytest.approx((16 + 5) + (6 + 5) + LAYERS * 3)


def test_the_1f1b_order_keeps_as_many_forwards_ahead_as_stages_follow() -> None:
    def order(stage: int, num_stages: int, count: int) -> str:
        steps = one_forward_one_backward(stage, num_stages, count)
        return " ".join(f"{kind.value}{index}" for kind, index in steps)

    assert order(0, 3, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert order(1, 3, 4) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert order(2, 3, 2) == "F0 B0 F1 B1"
    assert order(0, 4, 1) == "F0 B0"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
def test_stages_are_as_balanced_as_can_be(seconds: list[int], num_stages: int) -> None:
    stages = balanced_stages(seconds, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(seconds)))
    slowest = max(sum(seconds[i] for i in stage) for stage in stages)

    def best(begin: int, left: int) -> int:
        if left == 1:
            return sum(seconds[begin:])
        ends = range(begin + 1, len(seconds) - left + 2)
        return min(max(sum(seconds[begin:end]), best(end, left - 1)) for end in ends)

    assert slowest == best(0, min(num_stages, len(seconds)))


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_zero3_fetches_every_layer_twice_a_microbatch_whatever_the_number_of_gpus(
    num_devices: int,
) -> None:
    graph, costs = model()
    outcome = zero3_step(graph, costs, machine(num_devices, 10**6), 8, 1)
    count = 8 // num_devices
    assert outcome.traffic["h2d", "weights"] == 2 * count * graph.weight_nbytes()
    assert outcome.traffic["d2h", "gradients"] == count * graph.gradient_nbytes()
    others = (num_devices - 1) * 3 * count * graph.weight_nbytes()
    peers = sum(n for (link, _), n in outcome.traffic.items() if link == "p2p")
    assert peers == others


def test_zero3_lets_the_inputs_of_layers_wait_on_the_host_where_they_do_not_fit() -> None:
    graph, costs = model()
    values = tuple(replace(v, nbytes_per_sample=500) for v in graph.values)
    large = replace(graph, values=values)
    stashed = zero3_step(large, costs, machine(1, 4 * WEIGHT + 2500), 1, 1)
    assert stashed.traffic["d2h", "stash"] == stashed.traffic["h2d", "stash"] == 500 * LAYERS
    assert ("d2h", "stash") not in zero3_step(large, costs, machine(1, 10**6), 1, 1).traffic


@settings(max_examples=40)
@given(
    st.sampled_from(["dp", "pp"]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.integers(2100, 20_000),
    st.integers(0, 400),
)
def test_no_step_is_shorter_than_its_bound_and_more_memory_never_moves_more(
    mode: str, recompute: bool, num_devices: int, memory: int, saved: int
) -> None:
    graph, costs = model(saved)
    sizes = [
        swap_step(graph, costs, machine(num_devices, nbytes), 4, 1, mode, recompute=recompute)  # type: ignore[arg-type]
        for nbytes in (memory + 2 * saved, 200 * WEIGHT)
    ]
    assert all(outcome.step_s >= outcome.bound_s * (1 - 1e-9) for outcome in sizes)
    assert sizes[1].swap_nbytes == 0 <= sizes[0].swap_nbytes


def test_what_cannot_be_is_refused() -> None:
    graph, costs = model()
    with pytest.raises(DoesNotFitError, match="one task needs"):
        swap_step(graph, costs, machine(1, WEIGHT), 1, 1, "dp", recompute=True)
    with pytest.raises(DoesNotFitError, match="a layer and the next need"):
        zero3_step(graph, costs, machine(1, WEIGHT), 1, 1)
    with pytest.raises(ConfigError, match="a minibatch of 5 is not 2 equal shares"):
        swap_step(graph, costs, machine(2, 10**6), 5, 1, "dp", recompute=True)
    with pytest.raises(ConfigError, match="chains of layers"):
        skips = chain(LAYERS, skips=((0, 4),))
        swap_step(skips, costs, machine(2, 10**6), 4, 1, "pp", recompute=True)
    slow = machine(1, 10**6)
    slow = replace(slow, devices=(replace(slow.devices[0], update_bytes_per_s=0.0),))
    with pytest.raises(ConfigError, match="update_bytes_per_s"):
        swap_step(graph, costs, slow, 4, 1, "dp", recompute=True)
    with pytest.raises(DoesNotFitError, match="no microbatch size to try"):
        fastest(lambda size: zero3_step(graph, costs, slow, 4, size), [])
