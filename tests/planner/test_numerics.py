"""Plans like another one: other packs and policies, the same bits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.numerics import Numerics, numerics_of
from harmony.planner.search.search import choose
from tests.planner.test_search import saving
from tests.toys import MIB, chain, server, uniform_costs


def other_costs(graph: LayerGraph, seed: int) -> CostTable:
    """Costs of the same bytes that took other times."""
    draw = random.Random(seed)
    bare = uniform_costs(graph)
    rows = []
    for row in bare.by_layer:
        times = [10 ** draw.uniform(-5, -2) for _ in range(3)]
        rows.append(
            {
                size: LayerCost(
                    times[0] * size,
                    times[1] * size,
                    times[2],
                    cost.forward_nbytes * size,
                    cost.saved_nbytes * size,
                    cost.backward_nbytes * size,
                )
                for size, cost in ((s, next(iter(row.values()))) for s in (1, 4))
            }
        )
    return CostTable(tuple(rows))


def other_links(machine: Machine, seed: int) -> Machine:
    rate = 10 ** random.Random(seed).uniform(7, 11)
    devices = tuple(
        replace(d, h2d_bytes_per_s=rate, d2h_bytes_per_s=rate, p2p_bytes_per_s=rate)
        for d in machine.devices
    )
    return replace(machine, devices=devices)


def bits(graph: LayerGraph, plan: Plan, *, updates_alike: bool = True) -> Numerics:
    return numerics_of(graph, plan.spec, plan.policy, updates_alike=updates_alike)


@pytest.mark.parametrize("phase", [Phase.TRAIN, Phase.BACKWARD])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_plan_like_another_computes_its_bits_by_whatever_costs(
    num_devices: int, tied: bool, phase: Phase
) -> None:
    graph = chain(10, weight=2 * MIB, per_sample=64 * 1024, tied=tied)
    machine = server(num_devices, memory=24 * MIB)
    first = choose(graph, other_costs(graph, 0), machine, 12, phase=phase)
    chosen = set()
    for seed in range(1, 5):
        costs, links = other_costs(graph, seed), other_links(machine, seed)
        plan = choose(graph, costs, links, 12, phase=phase, like=first)
        assert bits(graph, plan) == bits(graph, first)
        chosen.add((plan.spec, plan.policy))
    assert len(chosen) > 1


def test_unequal_microbatches_stay_unequal() -> None:
    cheap = {
        1: LayerCost(1e-3, 2e-3, 0.0, 512, 2048, 1024),
        4: LayerCost(1.1e-3, 8e-3, 0.0, 512, 8192, 4096),
    }
    graph = saving(chain(12, weight=2 * MIB), 8 * MIB)
    machine = server(1, memory=24 * MIB)
    costs = CostTable((cheap,) * 12)
    first = choose(graph, costs, machine, 8, microbatch_size=1)
    assert (first.spec.forward_size, first.spec.backward_size) == (4, 1)
    for seed in range(3):
        plan = choose(graph, other_costs(graph, seed), other_links(machine, seed), 8, like=first)
        assert (plan.spec.forward_size, plan.spec.backward_size) == (4, 1)


def test_all_uses_of_a_parameter_that_were_added_up_together_still_are() -> None:
    """Packs may not be parted otherwise where every layer uses the same parameter."""
    graph = chain(8, weight=MIB, tied=True)
    shared = replace(graph.shared[0], layers=tuple(range(8)))
    layers = tuple(replace(layer, shared=(0,)) for layer in graph.layers)
    graph = replace(graph, layers=layers, shared=(shared,))
    machine = server(2, memory=12 * MIB)
    first = choose(graph, other_costs(graph, 0), machine, 8)
    for seed in range(1, 5):
        plan = choose(graph, other_costs(graph, seed), other_links(machine, seed), 8, like=first)
        assert plan.spec.backward_packs == first.spec.backward_packs


def test_updates_stay_where_they_are_if_that_makes_a_difference() -> None:
    graph = chain(8, weight=2 * MIB)
    machine = server(1, memory=60 * MIB, rate=1e8)
    device = replace(machine.devices[0], update_bytes_per_s=1e9)
    machine = replace(machine, devices=(device,), updates_alike=False)
    first = choose(graph, uniform_costs(graph), machine, 8)
    assert 0 < len(first.policy.resident) < len(first.spec.backward_packs)
    for seed in range(1, 4):
        plan = choose(graph, other_costs(graph, seed), other_links(machine, seed), 8, like=first)
        updated = bits(graph, plan, updates_alike=False).updated
        assert updated == bits(graph, first, updates_alike=False).updated != ()


def test_machines_remember_whether_updates_are_alike() -> None:
    machine = replace(server(1), updates_alike=False)
    assert Machine.from_json(machine.to_json()) == machine
