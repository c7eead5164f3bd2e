"""Packs that keep the results of their products: tasks, seconds, checker, search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.errors import PlanError, ScheduleError
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec, Task, TensorRef
from harmony.planner.lower.passes import lower
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.simulate import simulate
from harmony.planner.search import ranking, search
from tests.toys import chain, packs, server, step, with_products

GRAPH = with_products(chain(4))
MIXED = replace(
    step(2, 1, packs(1, 2), packs(1, 2, 4)), saved=packs(1), saved_runs=1, products=packs(1, 2)
)


def costs(graph: LayerGraph, size: int = 1) -> CostTable:
    """Forward 1 s a layer, of which products are 0.75 s; backward 2 s."""
    cost = LayerCost(1.0, 2.0, 0.5, 0, 500, 0, 300, 0.75)
    return CostTable(tuple({size: cost} for _ in graph.layers))


def lowered(spec: StepSpec, policy: Policy) -> Schedule:
    return lower(build_tasks(GRAPH, spec), server(1), policy)


def test_a_backward_reads_the_results_and_what_the_rest_is_recomputed_from() -> None:
    tasks = build_tasks(GRAPH, MIXED)
    reads = {str(task): {str(ref) for ref in refs} for task, refs in tasks.reads.items()}
    writes = {str(task): {str(ref) for ref in refs} for task, refs in tasks.writes.items()}
    # Of pack [0:1] the second microbatch saves everything, so its input is not needed.
    assert "P[0:1]@0:1" in writes["F[0:1]@0:1"] and "S[0:1]@1:2" in writes["F[0:1]@1:2"]
    assert {"P[0:1]@0:1", "X0@0:1"} <= reads["B[0:1]@0:1"]
    assert "S[0:1]@1:2" in reads["B[0:1]@1:2"] and "X0@1:2" not in reads["B[0:1]@1:2"]
    assert {"P[1:2]@1:2", "X1@1:2"} <= reads["B[1:2]@1:2"]
    assert TensorRef.parse("P[1:2]@1:2").nbytes(GRAPH) == 300


def test_a_backward_takes_what_is_left_of_the_forward() -> None:
    timeline = simulate(lowered(MIXED, Policy(offload=packs(1))), GRAPH, costs(GRAPH), server(1))
    runs = {span.label.split(" (")[0]: span for span in timeline.on("gpu0.compute")}
    seconds = {name: round(span.duration_s, 3) for name, span in runs.items()}
    assert (seconds["Run F[0:1]@0:1"], seconds["Run B[0:1]@0:1"]) == (1.0, 2.25)
    assert (seconds["Run B[0:1]@1:2"], seconds["Run B[1:2]@0:1"]) == (2.0, 2.25)
    moved = [s for s in timeline.spans if s.label.endswith(" P[0:1]@0:1") and s.nbytes]
    assert {(s.lane, s.nbytes, s.kind) for s in moved} == {
        ("gpu0.d2h", 300, "saved"),
        ("gpu0.h2d", 300, "saved"),
    }


@pytest.mark.parametrize("op", [Op.SWAP_OUT, Op.SWAP_IN])
def test_a_result_that_is_forgotten_is_refused(op: Op) -> None:
    schedule = lowered(MIXED, Policy(offload=packs(1)))
    tasks = build_tasks(GRAPH, MIXED)
    verify(schedule, GRAPH, None, Phase.TRAIN, tasks)
    lost = TensorRef.parse("P[0:1]@0:1")
    program = [s for s in schedule.programs[0] if (s.op, s.ref) != (op, lost)]
    assert len(program) == len(schedule.programs[0]) - 1
    with pytest.raises(ScheduleError, match=r"P\[0:1\]@0:1"):
        verify(replace(schedule, programs=(tuple(program),)), GRAPH, None, Phase.TRAIN, tasks)


def test_a_backward_that_recomputes_the_products_too_is_not_the_step() -> None:
    schedule = lowered(MIXED, Policy())
    task, lost = Task.parse("B[0:1]@0:1"), TensorRef.parse("P[0:1]@0:1")
    program = [
        s._replace(reads=tuple(r for r in s.reads if r != lost)) if s.task == task else s
        for s in schedule.programs[0]
    ]
    with pytest.raises(ScheduleError, match="does not read and write what it should"):
        verify(
            replace(schedule, programs=(tuple(program),)),
            GRAPH,
            None,
            Phase.TRAIN,
            build_tasks(GRAPH, MIXED),
        )


def test_results_of_some_microbatches_are_spread_over_those_that_leave_no_more() -> None:
    spec = replace(
        step(8, 1, packs(1, 2), packs(1, 2, 4)),
        saved=packs(1),
        saved_runs=2,
        products=packs(1, 2),
        products_runs=3,
    )
    kept = {
        pack: [spec.kept_by(pack, 0, (at, at + 1)) for at in range(8)] for pack in spec.products
    }
    first, second = ("".join("-" if r is None else r.kind.value for r in x) for x in kept.values())
    assert (first, second) == ("-P-SP-PS", "--P--P-P")
    with pytest.raises(PlanError, match="products_runs is between 0"):
        build_tasks(GRAPH, replace(spec, products_runs=7))


def test_interleaved_rounds_take_turns_pack_by_pack() -> None:
    spec = step(4, 1, packs(1, 2), packs(1, 2, 4))
    spec = replace(spec, saved=packs(1, 2), rounds=2, interleaved=True)
    tasks = build_tasks(GRAPH, spec)
    order = [str(task) for task in tasks.tasks if task.samples and task.samples[0] % 2 == 0]
    assert order == [
        "F[0:1]@0:1",
        "F[1:2]@0:1",
        "B[2:4]@0:1",
        "F[0:1]@2:3",
        "B[1:2]@0:1",
        "B[0:1]@0:1",
        "F[1:2]@2:3",
        "B[2:4]@2:3",
        "B[1:2]@2:3",
        "B[0:1]@2:3",
    ]
    schedule = lower(tasks, server(1), Policy(offload=packs(1, 2)))
    verify(schedule, GRAPH, None, Phase.TRAIN, tasks)
    # What a FORWARD leaves lies where another pack's BACKWARD of the round before has read.
    assert "SwapOut S[0:1]@2:3 over S[1:2]@0:1" in str(schedule)
    with pytest.raises(PlanError, match="one round"):
        build_tasks(GRAPH, replace(spec, rounds=1))


def slow_link(update_s: float) -> tuple[LayerGraph, CostTable, Machine]:
    graph = with_products(chain(12, weight=2**20, per_sample=2**14), 2**21)
    layers = tuple(replace(x, saved_nbytes_per_sample=2**22) for x in graph.layers)
    cost = LayerCost(1.0, 2.0, update_s, 0, 2**22, 0, 2**21, 0.6)
    last = replace(cost, backward_nbytes=46 * 2**20)
    table = CostTable(tuple({1: each} for each in (*[cost] * 11, last)))
    return replace(graph, layers=layers), table, server(1, 90 * 2**20, 2 * 2**20)


def test_a_search_interleaves_where_the_link_needs_the_time_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forward takes 1 s and leaves what the link takes 2 s for, a backward as much."""
    graph, table, machine = slow_link(update_s=1e-3)
    plan = search.choose(graph, table, machine, 32, microbatch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "interleaving", lambda *_, **__: ())
        without = search.choose(graph, table, machine, 32, microbatch_size=1)
    assert plan.spec.interleaved and plan.step_s < 0.97 * without.step_s
    assert Plan.from_json(plan.to_json()).spec == plan.spec
    assert any("interleaved rounds" in line for line in plan.describe())


def test_updates_that_wait_hide_behind_whole_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that are not interleaved have some, and win where updates are long."""
    graph, table, machine = slow_link(update_s=15.0)
    machine = replace(machine, updates_overlap=True, updates_wait=True)
    plan = search.choose(graph, table, machine, 32, microbatch_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "interleaving", lambda *_, **__: ())
        without = search.choose(graph, table, machine, 32, microbatch_size=1)
    assert without.spec.late and plan.step_s <= without.step_s


def test_packs_whose_products_are_not_known_are_refused() -> None:
    with pytest.raises(PlanError, match="results of its products, but none is known"):
        build_tasks(chain(4), replace(MIXED, saved=(), saved_runs=0))
    with pytest.raises(PlanError, match="not both a FORWARD and a BACKWARD pack"):
        build_tasks(GRAPH, replace(MIXED, products=packs(4)))


def test_a_search_keeps_them_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the link in the middle saving everything takes too long, and so does recomputing it."""
    graph = with_products(chain(8, weight=2**20, per_sample=2**14), 2**16)
    layers = tuple(replace(x, saved_nbytes_per_sample=2**22) for x in graph.layers)
    graph = replace(graph, layers=layers)
    cost = LayerCost(1.0, 2.0, 1e-3, 0, 2**22, 0, 2**16, 0.75)
    table = CostTable(tuple({1: cost} for _ in graph.layers))
    for rate in (2**18, 2**20, 2**23):
        machine = server(1, 24 * 2**20, rate)
        plan = search.choose(graph, table, machine, 8, microbatch_size=1)
        with monkeypatch.context() as patch:
            patch.setattr(search, "knows_products", lambda _: False)
            without = search.choose(graph, table, machine, 8, microbatch_size=1)
        assert not without.spec.products and plan.step_s <= without.step_s
        if rate != 2**20:
            continue
        assert plan.spec.products and plan.step_s < 0.9 * without.step_s
        assert Plan.from_json(plan.to_json()).spec == plan.spec
        assert any("results of products" in line for line in plan.describe())
