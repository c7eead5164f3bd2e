"""The predicted timeline: times worked out by hand, kinds and causes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Device, Host, Machine, Switch
from harmony.core.timeline import Span, Timeline
from harmony.errors import ScheduleError
from harmony.planner.ir.issue import Position, issue_order
from harmony.planner.ir.kinds import span_kind, span_kinds
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.bottleneck import bottleneck
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.predict.links import Links
from harmony.planner.predict.simulate import Simulation, simulate, stall_causes
from tests.strategies import layer_graphs, policies, specs
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


def test_a_device_that_updates_waits_for_its_new_weights_to_leave() -> None:
    graph = chain(2, weight=1000, per_sample=0)
    device = replace(machine().devices[0], update_bytes_per_s=1e6)
    one = replace(machine(), devices=(device,))
    spec = step(1, 1, packs(1), packs(1, 2))
    policy = Policy(resident=packs(1, 2))
    timeline, schedule = timeline_of(graph, spec, one, policy, costs(graph))
    stalls = stall_causes(timeline, schedule)[0]
    assert stalls["new weights"] == pytest.approx(1.0, abs=0.01) and "weights" not in stalls
    assert bottleneck(timeline, schedule, spec)[0] == "compute"
    slow = replace(one, devices=(replace(device, d2h_bytes_per_s=10.0),))
    timeline, schedule = timeline_of(graph, spec, slow, policy, costs(graph))
    assert bottleneck(timeline, schedule, spec)[0] == "d2h"


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


def test_saved_activations_move_as_copies_and_nothing_is_recomputed() -> None:
    graph = chain(8, weight=1000, per_sample=100)
    spec = replace(step(1, 1, packs(2, 4, 6), packs(2, 4, 6, 8)), saved=packs(2))
    policy = Policy(lookahead=1, offload=packs(2), mirror=True)
    timeline, _ = timeline_of(graph, spec, machine(), policy, costs(graph))
    runs = {span.label.split(" (")[0]: span for span in timeline.on("gpu0.compute")}
    # Two layers: 2 s forward, 4 s backward; the recompute of the last pack is its forward.
    assert runs["Run F[0:2]@0:1"].duration_s == pytest.approx(2.0)
    assert runs["Run B[6:8]@0:1"].duration_s == pytest.approx(6.0)
    assert runs["Run B[0:2]@0:1"].duration_s == pytest.approx(4.0)
    moved = [span for span in timeline.spans if span.label.endswith(" S[0:2]@0:1") and span.nbytes]
    assert {span.lane for span in moved} == {"gpu0.d2h", "gpu0.h2d"}
    assert {span.nbytes for span in moved} == {graph.saved_nbytes(0, 2, 1)}


@pytest.mark.parametrize(("rate", "seconds"), [(500.0, 4.0), (0.0, 0.5 * 2)])
def test_an_update_on_a_device_takes_its_gradients_at_the_rate_of_the_device(
    rate: float, seconds: float
) -> None:
    """Where that is not known, as long as on the host."""
    schedule = Schedule.parse(
        """
        schedule minibatch=1
        device gpu0 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        program gpu0
          compute Run U[0:2] (dW[0:2]%0 K[0:2] W[0:2]) -> K[0:2] W[0:2]
        """
    )
    graph = chain(2, weight=1000)
    one = machine()
    device = replace(one.devices[0], update_bytes_per_s=rate)
    timeline = simulate(schedule, graph, costs(graph), replace(one, devices=(device,)))
    assert timeline.step_s == pytest.approx(seconds)


def test_a_switch_is_shared_by_the_devices_that_copy_at_the_same_time() -> None:
    graph = chain(2, weight=1000, per_sample=0)
    spec = step(2, 1, (), packs(2), replicas=2)
    two = machine(2)
    behind = replace(two, switches=(Switch((0, 1), 1000.0, 500.0),))
    for model, h2d_s, d2h_s in (("fair", 4.0, 8.0), ("static", 4.0, 8.0)):
        schedule = lower(build_tasks(graph, spec), behind, Policy())
        timeline = simulate(schedule, graph, costs(graph), behind, model)  # type: ignore[arg-type]
        for lane, seconds in (("h2d", h2d_s), ("d2h", d2h_s)):
            copies = [s for i in (0, 1) for s in timeline.on(f"gpu{i}.{lane}") if s.nbytes > 999]
            assert [span.duration_s for span in copies] == pytest.approx([seconds] * 2, rel=0.01)
    # Alone on the switch a device has all of it, unless its share is fixed.
    alone = chain(2, weight=1000, per_sample=0)
    lone = lower(build_tasks(alone, step(1, 1, (), packs(2))), behind, Policy())
    assert simulate(lone, alone, costs(alone), behind).on("gpu0.h2d")[0].duration_s == 2.0


def test_peers_without_a_link_of_their_own_use_the_links_to_the_host() -> None:
    direct = replace(machine(4), switches=(Switch((0, 1), 9.0, 9.0), Switch((2, 3), 9.0, 9.0)))
    assert Links(direct).path(Op.SEND, 0, 1) == ("gpu0.p2p",)
    links = Links(replace(direct, peer_links="host"))
    assert links.path(Op.SEND, 0, 1) == ("gpu0.p2p", "gpu0.d2h", "gpu1.h2d")
    assert links.path(Op.SEND, 1, 2) == (
        *("gpu1.p2p", "gpu1.d2h"),
        *("switch0.d2h", "switch1.h2d", "gpu2.h2d"),
    )


def test_copies_updates_and_accumulations_share_host_memory() -> None:
    graph = chain(2, weight=1000, per_sample=0)
    spec = step(2, 1, packs(1), packs(1, 2), replicas=2)
    two = machine(2)
    host = replace(two.host, memory_bytes_per_s=1000.0, update_memory_factor=2.0)
    timeline, _ = timeline_of(graph, spec, replace(two, host=host), Policy(), costs(graph))
    first = timeline.on("gpu0.h2d")[0]
    assert first.nbytes == 1000 and first.duration_s == pytest.approx(2.0)
    for span in timeline.on("host.update"):
        # Adding moves 3 bytes a byte, the update 2: at 1000 a second, when nobody else wants it.
        assert span.duration_s >= (3.0 if span.kind == "accumulate" else 2.0) - 1e-9


def test_virtual_gpus_that_compute_at_the_same_time_share_the_cores() -> None:
    graph = chain(2, weight=1, per_sample=0)
    spec = step(2, 1, (), packs(2), replicas=2)
    two = machine(2)
    for share, factor in ((0.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.5, 3.0)):
        timeline, _ = timeline_of(
            graph, spec, replace(two, cpu_share=share), Policy(), costs(graph)
        )
        runs = [timeline.on(f"gpu{i}.compute")[0] for i in (0, 1)]
        assert [run.duration_s for run in runs] == pytest.approx([6 * factor] * 2)


def drawn(data: st.DataObject) -> tuple[LayerGraph, Schedule, int]:
    """Any schedule of any model, and the number of its devices."""
    graph = data.draw(layer_graphs())
    num_devices = data.draw(st.integers(1, 4))
    replicas = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    spec = data.draw(specs(graph, data.draw(st.sampled_from(replicas))))
    policy = data.draw(policies(graph, spec))
    return graph, lower(build_tasks(graph, spec), server(num_devices), policy), num_devices


def free_machine(num_devices: int) -> Machine:
    device = Device("free", 10**9, inf, inf, inf, update_bytes_per_s=inf)
    return Machine((device,) * num_devices, Host(10**12, accumulate_bytes_per_s=inf))


@settings(max_examples=60)
@given(st.data())
def test_without_costs_nothing_takes_time_and_the_order_is_one_that_threads_can_issue(
    data: st.DataObject,
) -> None:
    graph, schedule, num_devices = drawn(data)
    nothing = CostTable(tuple({1: LayerCost(0.0, 0.0, 0.0, 0, 0, 0)} for _ in graph.layers))
    timeline = simulate(schedule, graph, nothing, free_machine(num_devices))
    assert timeline.step_s == 0.0
    assert all(span.start_s == span.end_s == 0.0 for span in timeline.spans)
    where = {name: index for index, (name, _) in enumerate(schedule.all_programs())}
    issued = iter(issue_order(schedule))
    for span in timeline.spans:  # each of them, in this order, among all that is issued
        at = Position(where[span.lane.split(".")[0]], span.index)
        assert at in issued


@settings(max_examples=60)
@given(st.data())
def test_a_step_is_never_shorter_than_what_its_lanes_do_or_than_its_longest_chain(
    data: st.DataObject,
) -> None:
    graph, schedule, num_devices = drawn(data)
    table = uniform_costs(graph)
    timeline = simulate(schedule, graph, table, server(num_devices))
    for lane in timeline.lanes():
        spans = timeline.on(lane)
        assert timeline.step_s >= timeline.busy_s(lane) * (1 - 1e-9)
        assert all(a.end_s <= b.start_s for a, b in pairwise(spans))
    assert timeline.step_s == Simulation(schedule, graph, table, server(num_devices)).step_s
    chain_s = Simulation(schedule, graph, table, free_machine(num_devices)).step_s
    assert timeline.step_s >= chain_s * (1 - 1e-9)


def contended(num_devices: int) -> Machine:
    """Everything that can be shared is, and is narrow."""
    one = server(num_devices)
    host = replace(one.host, memory_bytes_per_s=1.5e9)
    switch = Switch(tuple(range(num_devices)), 1.2e9, 0.7e9)
    return replace(one, host=host, switches=(switch,), peer_links="host")


@settings(max_examples=60)
@given(st.data())
def test_shared_links_are_never_faster_than_links_of_ones_own_nor_slower_than_fixed_shares(
    data: st.DataObject,
) -> None:
    graph, schedule, num_devices = drawn(data)
    table = uniform_costs(graph)
    own = simulate(schedule, graph, table, server(num_devices)).spans
    shared = simulate(schedule, graph, table, contended(num_devices)).spans
    assert all(b.end_s >= a.end_s * (1 - 1e-9) for a, b in zip(own, shared, strict=True))
    # With as many times the bandwidth as there are lanes, nothing is slower than alone.
    lanes = 4 * num_devices + 1
    wide = contended(num_devices)
    host = replace(wide.host, memory_bytes_per_s=1.5e9 * lanes)
    fast = replace(wide, host=host, switches=(), peer_links="direct")
    again = simulate(schedule, graph, table, fast).spans
    assert all(b.end_s <= a.end_s * (1 + 1e-9) for a, b in zip(shared, again, strict=True))


@settings(max_examples=60)
@given(st.data())
def test_on_links_of_ones_own_more_bandwidth_is_never_slower(data: st.DataObject) -> None:
    """Not so where links are shared: see the anomaly in test_flows."""
    graph, schedule, num_devices = drawn(data)
    slow = server(num_devices)
    chosen = data.draw(st.integers(0, num_devices - 1))
    name = data.draw(st.sampled_from(["h2d_bytes_per_s", "d2h_bytes_per_s", "p2p_bytes_per_s"]))
    faster = replace(slow.devices[chosen], **{name: 3e9})
    devices = (*slow.devices[:chosen], faster, *slow.devices[chosen + 1 :])
    table = uniform_costs(graph)
    before = simulate(schedule, graph, table, slow).spans
    after = simulate(schedule, graph, table, replace(slow, devices=devices)).spans
    assert all(b.end_s <= a.end_s * (1 + 1e-9) for a, b in zip(before, after, strict=True))


@settings(max_examples=40)
@given(st.data())
def test_updates_that_wait_begin_when_all_else_is_over(data: st.DataObject) -> None:
    """As with a clipped norm, or an optimizer that looks at all gradients together."""
    graph, schedule, num_devices = drawn(data)
    table, own = uniform_costs(graph), server(num_devices)
    waiting = replace(own, updates_wait=True)
    at_once = simulate(schedule, graph, table, own)
    found = simulate(schedule, graph, table, waiting)
    updates = [s for s in found.spans if s.kind == "update" and s.lane.startswith("host")]
    held = [s for s in updates if " L[" not in s.label]  # those are of the step before
    others = [s for s in found.spans if s not in held]
    if held:
        assert min(s.start_s for s in held) >= max(s.end_s for s in others) * (1 - 1e-9)
    assert len(found.spans) == len(at_once.spans)
    assert found.step_s >= at_once.step_s * (1 - 1e-9)


def test_threads_that_wait_for_each_other_are_shown() -> None:
    schedule = Schedule.parse(
        """
        schedule minibatch=1
        device gpu0 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        device gpu1 memory=1 weight_slots=0x0 gradient_slots=0x0 stages=0x0
        program gpu0
          compute Wait e0
          h2d     Record e1
        program gpu1
          compute Wait e1
          h2d     Record e0
        """
    )
    graph = chain(2)
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(schedule, graph, costs(graph), machine(2))
