"""Measured steps correct the costs: from what a slower machine does, its costs are found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.cost import CostTable
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.refine import MOST, refine
from tests.toys import MIB, chain, packs, server, step, uniform_costs

MODEL = chain(8, weight=2 * MIB, per_sample=256 * 1024)
BELIEVED = uniform_costs(MODEL)
SPEC = step(8, 2, packs(2, 4, 6), packs(2, 4, 6, 8))


def schedule_of(spec: StepSpec, machine: Machine, policy: Policy | None = None) -> Schedule:
    tasks = build_tasks(MODEL, spec)
    schedule = lower(tasks, machine, policy or Policy())
    verify(schedule, MODEL, None, spec.phase, tasks)
    return schedule


def slower(
    costs: CostTable, forward: float, backward: float, update: float, layers: range
) -> CostTable:
    return CostTable(
        tuple(
            {
                size: replace(
                    cost,
                    forward_s=cost.forward_s * forward,
                    backward_s=cost.backward_s * backward,
                    update_s=cost.update_s * update,
                )
                if layer in layers
                else cost
                for size, cost in sizes.items()
            }
            for layer, sizes in enumerate(costs.by_layer)
        )
    )


def seconds(graph: LayerGraph, schedule: Schedule, costs: CostTable, machine: Machine) -> float:
    return simulate(schedule, graph, costs, machine).step_s


@pytest.mark.parametrize("saved", [False, True])
def test_costs_are_found_from_what_steps_take(saved: bool) -> None:
    spec = replace(SPEC, saved=packs(2, 4)) if saved else SPEC
    believed, real = server(1), server(1, rate=4e8)
    truth = slower(BELIEVED, 1.5, 3.0, 2.0, range(2, 4))
    schedule = schedule_of(spec, believed)
    measured = simulate(schedule, MODEL, truth, real)
    before = simulate(schedule, MODEL, BELIEVED, believed)
    found = refine(schedule, BELIEVED, believed, before, [measured] * 3)
    for layer in range(6):
        wanted, cost = truth.layer(layer, 2), found.costs.layer(layer, 2)
        assert cost.forward_s == pytest.approx(wanted.forward_s, rel=0.02)
        assert cost.backward_s == pytest.approx(wanted.backward_s, rel=0.02)
        assert cost.update_s == pytest.approx(wanted.update_s)
    device = found.machine.devices[0]
    assert device.h2d_bytes_per_s == pytest.approx(4e8)
    assert device.d2h_bytes_per_s == pytest.approx(4e8)
    again = seconds(MODEL, schedule, found.costs, found.machine)
    assert again == pytest.approx(measured.step_s, rel=0.01)
    assert found.worst >= 2.5


def test_nothing_changes_where_the_prediction_was_right() -> None:
    machine = server(2)
    schedule = schedule_of(SPEC, machine)
    timeline = simulate(schedule, MODEL, BELIEVED, machine)
    found = refine(schedule, BELIEVED, machine, timeline, [timeline])
    assert found.worst == pytest.approx(1.0)
    after = seconds(MODEL, schedule, found.costs, found.machine)
    assert after == pytest.approx(timeline.step_s)


def test_what_is_measured_once_wrongly_changes_little() -> None:
    """The median of several steps counts, and no factor is beyond belief."""
    machine = server(1)
    schedule = schedule_of(SPEC, machine)
    right = simulate(schedule, MODEL, BELIEVED, machine)
    wrong = simulate(schedule, MODEL, slower(BELIEVED, 1000, 1000, 1000, range(8)), machine)
    found = refine(schedule, BELIEVED, machine, right, [right, wrong, right])
    assert found.worst == pytest.approx(1.0)
    assert refine(schedule, BELIEVED, machine, right, [wrong]).worst == MOST
