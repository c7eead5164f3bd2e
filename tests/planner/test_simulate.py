"""The predicted timeline: times worked out by hand, kinds and causes."""

from __future__ import annotations

import pytest

from harmony.layergraph import LayerGraph
from harmony.machine import Device, Host, Machine
from harmony.planner.build import build_tasks
from harmony.planner.cost import CostTable, LayerCost
from harmony.planner.kinds import span_kind, span_kinds
from harmony.planner.passes import lower
from harmony.planner.policy import Policy
from harmony.planner.schedule import Schedule
from harmony.planner.simulate import simulate, stall_causes
from harmony.planner.tasks import Phase, StepSpec
from harmony.timeline import Span, Timeline
from tests.toys import chain, packs, server, step, uniform_costs


def machine(num_devices: int = 1, h2d: float = 1000.0, d2h: float = 1000.0) -> Machine:
    """Links that carry 1000 bytes a second: weights of 1000 bytes take a second."""
    device = Device("toy", 10**9, h2d, d2h, 1000.0)
    return Machine((device,) * num_devices, Host(10**12, accumulate_bytes_per_s=1000.0))


def costs(graph: LayerGraph, forward_s: float = 1.0, update_s: float = 0.5) -> CostTable:
    cost = LayerCost(forward_s, 2 * forward_s, update_s, 0, 0, 0)
    return CostTable(tuple({1: cost} for _ in graph.layers))


def timeline_of(
    graph: LayerGraph, spec: StepSpec, server: Machine, policy: Policy, table: CostTable
) -> tuple[Timeline, Schedule]:
    schedule = lower(build_tasks(graph, spec), server, policy)
    return simulate(schedule, graph, table, server), schedule


def spans(timeline: Timeline, lane: str) -> list[tuple[str, float, float]]:
    """Label up to the first bracketed argument, start and end, rounded."""
    return [
        (span.label.split(" (")[0], round(span.start_s, 6), round(span.end_s, 6))
        for span in timeline.on(lane)
        if span.kind not in ("inputs", "outputs")
    ]


def test_one_gpu_by_hand() -> None:
    """Two packs of one layer; one sample.

        h2d      W0 W1 W0
        compute     F0 B1B1B1 B0B0B0
        d2h                  dW1    dW0
        update                  U1     U0
    """
    graph = chain(2, weight=1000, per_sample=0)
    spec = step(1, 1, packs(1), packs(1, 2))
    timeline, _ = timeline_of(graph, spec, machine(), Policy(), costs(graph))
    assert spans(timeline, "gpu0.h2d") == [
        ("SwapIn W[0:1]", 0, 1),
        ("SwapIn W[1:2]", 1, 2),
        ("SwapIn W[0:1]", 2, 3),
    ]
    assert spans(timeline, "gpu0.compute") == [
        ("Run F[0:1]@0:1", 1, 2),
        ("Run B[1:2]@0:1", 2, 5),
        ("Run B[0:1]@0:1", 5, 8),
    ]
    # The loss leaves first: 4 bytes, 4 ms.
    assert spans(timeline, "gpu0.d2h") == [
        ("SwapOut dW[1:2]%0", 5.004, 6.004),
        ("SwapOut dW[0:1]%0", 8, 9),
    ]
    assert spans(timeline, "host.update") == [
        ("Run U[1:2]", 6.004, 6.504),
        ("Run U[0:1]", 9, 9.5),
    ]
    assert timeline.step_s == 9.5


def test_a_pipeline_overlaps_its_packs() -> None:
    graph = chain(4, weight=1, per_sample=0)
    spec = step(4, 1, packs(1, 2, 3), packs(1, 2, 3, 4))
    timeline, _ = timeline_of(graph, spec, machine(4), Policy(), costs(graph))
    starts = [timeline.on(f"gpu{i}.compute")[0].start_s for i in range(3)]
    assert starts == pytest.approx([0.001, 1.001, 2.001])


def test_one_slot_exposes_what_two_hide() -> None:
    graph = chain(6, weight=1000, per_sample=0)
    spec = step(2, 1, packs(2, 4), packs(2, 4, 6))
    steps = {}
    for slots in (1, 2):
        policy = Policy(weight_slots=slots, gradient_slots=slots)
        timeline, schedule = timeline_of(graph, spec, machine(), policy, costs(graph))
        steps[slots] = timeline.step_s
        stalls = stall_causes(timeline, schedule)[0]
        busy = timeline.busy_s("gpu0.compute")
        assert sum(stalls.values()) + busy == pytest.approx(timeline.step_s)
        if slots == 1:
            # W[0:2] at the start, then each next pack but for the last two: their gradient
            # slot takes as long to empty, and the loss in front of it 4 ms longer.
            assert stalls["weights"] == pytest.approx(3 * 2)
            assert stalls["gradients"] == pytest.approx(3 * 2, abs=0.01)
    assert steps[2] < steps[1]


def test_causes_of_stalls() -> None:
    graph = chain(4, weight=1000, per_sample=0)
    spec = step(1, 1, packs(2), packs(2, 4))
    slow = machine(d2h=10.0)
    timeline, schedule = timeline_of(graph, spec, slow, Policy(2, 1, 1), costs(graph))
    stalls = stall_causes(timeline, schedule)[0]
    # The slot of dW[2:4] is free only when its 200 seconds on the way out are over.
    assert stalls["gradients"] > 300
    timeline, schedule = timeline_of(
        graph, spec, machine(2), Policy(), costs(graph, update_s=50.0)
    )
    found = stall_causes(timeline, schedule)
    # gpu1 waits for F[0:2] on gpu0, and at the end for its B[0:2].
    assert found[1]["peer"] == pytest.approx(2.0 + 6.0, abs=0.01)
    assert found[0]["update"] > 90


def test_the_host_is_blamed_for_a_gap_that_nothing_explains() -> None:
    schedule = Schedule.parse(
        """
        schedule minibatch=1
        device gpu0 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        program gpu0
          h2d     SwapIn X0@0:1
          h2d     Record e0
          compute Wait e0
          compute Run F[0:1]@0:1 (X0@0:1) -> X1@0:1
        """
    )
    measured = Timeline(
        [
            Span("gpu0.h2d", "SwapIn X0@0:1", "inputs", 0.0, 1.0, 8, 0),
            Span("gpu0.compute", "Run F[0:1]@0:1", "forward", 1.5, 2.0, 0, 3),
        ],
        step_s=2.25,
    )
    assert stall_causes(measured, schedule) == [{"inputs": 1.0, "host": 0.75}]


def test_kinds_of_spans() -> None:
    graph = chain(6, skips=((0, 5),))
    spec = step(4, 1, packs(2, 4, 5), packs(3, 5, 6))
    tasks = build_tasks(graph, spec)
    schedule = lower(tasks, server(1), Policy(boundary="swap", lookahead=1))
    kinds = span_kinds(schedule, graph)
    found: dict[str, set[str]] = {}
    for name, program in schedule.all_programs():
        for instruction, kind in zip(program, kinds[name], strict=True):
            found.setdefault(str(instruction).split("@")[0].split(" (")[0], set()).add(kind)
    assert found["SwapIn X0"] == {"inputs"}
    assert found["SwapOut X6"] == {"outputs"}
    assert found["SwapOut X3"] == found["SwapIn X3"] == {"stash"}
    # X2 and X4 are only boundaries of FORWARD packs, X5 of the last one and B[5:6].
    assert found["SwapOut X2"] == found["SwapIn X2"] == {"activations"}
    assert found["SwapOut X5"] == found["SwapIn X5"] == {"stash"}
    assert found["SwapIn dX5"] == {"activations"}
    assert found["SwapIn W[0:2]"] == {"weights"}
    assert found["SwapOut dW[5:6]%0"] == {"gradients"}
    assert found["Run U[0:3]"] == {"update"}
    assert found["Drop X0"] == found["Alloc X0"] == {""}
    one = next(i for i in schedule.programs[0] if str(i).startswith("SwapIn X2"))
    assert span_kind(one, graph, for_backward=False) == "activations"


def test_what_a_forward_keeps_for_its_backward_is_stash() -> None:
    graph = chain(4)
    spec = step(2, 1, packs(2, 4), packs(2, 4), phase=Phase.FORWARD)
    schedule = lower(build_tasks(graph, spec), server(1), Policy())
    traffic = simulate(schedule, graph, uniform_costs(graph), server(1)).bytes_by()
    assert traffic["d2h", "stash"] == 2 * 1024 and traffic["d2h", "outputs"] == 2 * 4
