"""Lowering: golden schedules, the closed forms of the traffic, and random models."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.core.layergraph import LayerGraph
from harmony.errors import ConfigError, PlanError
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.simulate import simulate
from tests.strategies import layer_graphs, policies, specs
from tests.toys import chain, packs, server, step, uniform_costs

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = step(4, 2, packs(2), packs(2, 4))


def schedule_of(
    graph: LayerGraph, spec: StepSpec, num_devices: int, policy: Policy | None = None
) -> Schedule:
    """Lower and verify."""
    tasks = build_tasks(graph, spec)
    schedule = lower(tasks, server(num_devices), policy)
    verify(schedule, graph, uniform_costs(graph), spec.phase, tasks)
    return schedule


@pytest.mark.parametrize(
    ("name", "spec", "num_devices", "policy"),
    [
        ("one_gpu", SMALL, 1, Policy()),
        ("pp_two_gpus", SMALL, 2, Policy()),
        ("dp_two_gpus", step(4, 2, packs(2), packs(2, 4), replicas=2), 2, Policy()),
        ("one_gpu_swap", step(3, 1, packs(2), packs(2, 4)), 1, Policy(1, 1, 1, "swap")),
    ],
)
def test_golden_schedules(name: str, spec: StepSpec, num_devices: int, policy: Policy) -> None:
    """`UPDATE_GOLDEN=1 pytest` writes the files anew; read the difference before committing."""
    text = str(schedule_of(chain(4, tied=name == "dp_two_gpus"), spec, num_devices, policy))
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()
    assert str(Schedule.parse(text)) == text


def moved(schedule: Schedule, graph: LayerGraph, op: Op, *kinds: str) -> int:
    """Bytes that one kind of copy moves, over all devices."""
    return sum(
        i.ref.nbytes(graph)
        for program in schedule.programs
        for i in program
        if i.op is op and i.ref is not None and i.ref.kind.value in kinds
    )


@pytest.mark.parametrize("mode", ["pp", "dp"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
@pytest.mark.parametrize("backward_size", [1, 2])
def test_traffic_is_that_of_the_closed_forms(
    mode: str, num_devices: int, backward_size: int
) -> None:
    """Zero mismatches with the formulas fitted to the original's own schedules.

    They come from the published code of PVLDB 15(11), 2022 (github.com/msr-fiddle/harmony, MIT
    licence). Unlike there, inputs of the model are on the host already and are not stashed, and
    model outputs leave too.
    """
    graph, total, per_sample = chain(12), 12 * 64 * 1024, 1024
    replicas = num_devices if mode == "dp" else 1
    batch = 8 * replicas
    # Packs of F and B differ, so that no weights can stay for the next group of a device.
    forward, backward = packs(1, 4, 8), packs(3, 5, 8, 12)
    spec = step(batch, 2, forward, backward, backward_size=backward_size, replicas=replicas)
    schedule = schedule_of(graph, spec, num_devices, Policy(boundary="swap", lookahead=1))
    assert moved(schedule, graph, Op.SWAP_IN, "W") == replicas * (2 * total - total // 3)
    assert moved(schedule, graph, Op.SWAP_OUT, "dW") == replicas * total

    boundary = batch * per_sample
    data, stash = boundary, 2 * boundary  # of B[3:5] and B[5:8]; B[0:3] reads the data again
    forwards, backwards = 3 * boundary, 3 * boundary
    unequal = boundary if backward_size != 2 else 0
    h2d = moved(schedule, graph, Op.SWAP_IN, "X", "dX")
    d2h = moved(schedule, graph, Op.SWAP_OUT, "X", "dX")
    p2p = moved(schedule, graph, Op.SEND, "X", "dX")
    assert d2h >= moved(schedule, graph, Op.SWAP_OUT, "X")
    if mode == "pp" and num_devices > 1:
        assert p2p == forwards + backwards - unequal
        assert h2d == 2 * data + stash + unequal
        assert d2h == stash + unequal + 4 * batch
    else:
        assert p2p == 0
        assert h2d == 2 * data + stash + forwards + backwards
        # A value that is both a FORWARD boundary and a stash is written once: X8 is one.
        assert d2h == stash + forwards + backwards + 4 * batch


def test_pipeline_traffic_does_not_grow_with_the_number_of_gpus() -> None:
    """Each weight byte crosses the host links about 3 times a step whatever N is."""
    graph = chain(12)
    spec = step(8, 2, packs(3, 5, 7, 10), packs(2, 4, 6, 8, 10, 12))
    totals = {
        n: moved(s, graph, Op.SWAP_IN, "W") + moved(s, graph, Op.SWAP_OUT, "dW")
        for n in (1, 2, 3, 4)
        for s in [schedule_of(graph, spec, n)]
    }
    assert len(set(totals.values())) == 1
    assert totals[1] < 3 * graph.weight_nbytes()


def test_weights_that_the_next_group_needs_stay() -> None:
    """With two GPUs the last FORWARD pack and its BACKWARD follow each other on one of them."""
    graph, spec = chain(6), step(4, 1, packs(2, 4), packs(2, 4, 6))
    fetched = Counter(
        str(i.ref)
        for program in schedule_of(graph, spec, 2).programs
        for i in program
        if i.op is Op.SWAP_IN and i.ref is not None and i.ref.is_parameter
    )
    assert fetched == {"W[0:2]": 2, "W[2:4]": 1, "W[4:6]": 1}


def test_a_prefetch_precedes_the_group_that_hides_it() -> None:
    graph, spec = chain(6), step(4, 1, packs(2, 4), packs(2, 4, 6))
    for slots, before in ((1, 2), (2, 1), (3, 1)):
        policy = Policy(weight_slots=slots)
        lines = [str(i) for i in schedule_of(graph, spec, 1, policy).programs[0]]
        fetch = lines.index("SwapIn W[2:4]")
        runs = [i for i, line in enumerate(lines) if line.startswith("Run F")]
        # With one slot W[2:4] comes after all Runs of F[0:2], else before the first.
        assert (fetch > runs[3]) is (slots == 1), before


def test_gradients_leave_without_holding_up_the_next_group() -> None:
    graph, spec = chain(6), step(2, 1, packs(2, 4), packs(2, 4, 6))
    lines = [str(i) for i in schedule_of(graph, spec, 1).programs[0]]
    out, drop = lines.index("SwapOut dW[4:6]%0"), lines.index("Drop dW[4:6]%0")
    assert lines.index("Alloc dW[2:4]%0 slot 1") < drop < lines.index("Alloc dW[0:2]%0 slot 0")
    assert out < lines.index("Alloc dW[2:4]%0 slot 1")


def test_no_event_is_superfluous_or_unused() -> None:
    graph = chain(8, tied=True, skips=((0, 5),))
    schedule = schedule_of(graph, step(8, 2), 3)
    recorded = Counter(i.event for _, p in schedule.all_programs() for i in p if i.op is Op.RECORD)
    waited = {i.event for _, p in schedule.all_programs() for i in p if i.op is Op.WAIT}
    assert set(recorded) == waited
    assert set(recorded.values()) == {1}


@settings(max_examples=150)
@given(st.data())
def test_every_schedule_of_every_model_is_verified(data: st.DataObject) -> None:
    graph = data.draw(layer_graphs())
    num_devices = data.draw(st.integers(1, 4))
    replicas = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    spec = data.draw(specs(graph, data.draw(st.sampled_from(replicas))))
    tasks = build_tasks(graph, spec)
    schedule = lower(tasks, server(num_devices), data.draw(policies(graph, spec)))
    costs = uniform_costs(graph)
    checked = verify(schedule, graph, costs, spec.phase, tasks)
    assert Schedule.parse(str(schedule)) == schedule

    timeline = simulate(schedule, graph, costs, server(num_devices))
    assert tuple(timeline.peak_nbytes) == checked.peak_nbytes
    copies = (Op.SWAP_IN, Op.SWAP_OUT, Op.SEND)
    total = sum(
        i.ref.nbytes(graph)
        for program in schedule.programs
        for i in program
        if i.op in copies and i.ref is not None
    )
    assert sum(timeline.bytes_by().values()) == total


def test_the_same_question_gets_the_same_schedule() -> None:
    graph = chain(8, tied=True, skips=((0, 5), (1, 4)))
    texts = {str(schedule_of(graph, step(8, 2), 3)) for _ in range(3)}
    assert len(texts) == 1


def test_more_replicas_than_devices_are_refused() -> None:
    with pytest.raises(PlanError, match="2 replicas need as many devices; there are 1"):
        lower(build_tasks(chain(4), step(4, 2, packs(2), packs(2, 4), replicas=2)), server(1))


def test_impossible_policies_are_refused() -> None:
    with pytest.raises(ConfigError, match="weight_slots must be at least 1"):
        Policy(weight_slots=0)
    with pytest.raises(ConfigError, match="boundary"):
        Policy(boundary="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("boundary", ["keep", "swap", "host"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_gradient_of_an_input_leaves_for_the_host(replicas: int, boundary: str) -> None:
    """That it is complete by then, the checker sees to."""
    graph = chain(6, input_gradient=True, skips=((-1, 4),))
    ends = packs(2, 4, 6)
    spec = step(4, 1, ends, ends, replicas=replicas, phase=Phase.BACKWARD)
    policy = Policy(boundary=boundary)  # type: ignore[arg-type]
    schedule = schedule_of(graph, spec, 2, policy)
    out = [str(i.ref) for p in schedule.programs for i in p if i.op is Op.SWAP_OUT]
    assert {ref for ref in out if ref.startswith("dX0")} == {f"dX0@{i}:{i + 1}" for i in range(4)}


def test_inference_keeps_only_outputs() -> None:
    graph = chain(4)
    spec = step(4, 2, packs(2, 4), packs(2, 4), phase=Phase.INFER)
    schedule = schedule_of(graph, spec, 1)
    out = {str(i.ref) for i in schedule.programs[0] if i.op is Op.SWAP_OUT}
    assert out == {"X4@0:2", "X4@2:4"}
