"""The estimate of a step's time, stage by stage: what queues behind what, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harmony.core.machine import Machine, Switch
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.tasks import Pack, TaskKind
from harmony.planner.search.outline import Outline, StageOutline
from harmony.planner.search.sketch import Sketch, sketch
from tests.toys import server

POLICY = Policy(2, 2, 1)


def machine(num_devices: int = 1, **changes: float) -> Machine:
    """Devices whose links carry one byte a second, and whose Runs cost nothing extra."""
    found = server(num_devices, rate=1.0)
    device = replace(found.devices[0], **{"task_overhead_s": 0.0, **changes})
    return replace(found, devices=(device,) * num_devices)


def stage(kind: TaskKind = TaskKind.FORWARD, **changes: object) -> StageOutline:
    """Four microbatches of a second each that move nothing."""
    found = StageOutline(kind, Pack(0, 1), 0, 1.0, 4, 0, 0, 0)
    return replace(found, **changes)


def estimate(server: Machine, *stages: StageOutline) -> Sketch:
    ring = 1 + max(each.seat for each in stages)
    return sketch(Outline(stages, ring, 1), server, POLICY)


def test_a_stage_takes_its_microbatches_and_the_overhead_of_each() -> None:
    assert estimate(machine(), stage()).step_s == 4.0
    assert estimate(machine(task_overhead_s=0.5), stage()).step_s == 6.0
    assert estimate(machine(), stage(), stage()).step_s == 8.0


def test_a_second_device_starts_with_the_first_microbatch_of_the_first() -> None:
    found = estimate(machine(2), stage(), stage(seat=1))
    assert found.step_s == 5.0
    assert [busy[0] for busy in found.busy_s] == [4.0, 4.0]


@pytest.mark.parametrize(("peer_links", "step_s", "busy_s"), [("direct", 6, 4), ("host", 9, 8)])
def test_a_copy_to_a_peer_over_the_host_queues_behind_what_leaves_before_it(
    peer_links: str, step_s: float, busy_s: float
) -> None:
    # Each microbatch leaves one byte for the host. Those are out after 2, 3, 4 and 5 s. Another
    # byte of each goes to the peer: on a link of its own after 2, 3, 4 and 5 s, too, so that the
    # peer computes until 6 s; or, on the same link, after all the others, until 9 s.
    first = stage(outputs=1, passed=1, way="peer")
    found = estimate(replace(machine(2), peer_links=peer_links), first, stage(seat=1))
    assert found.step_s == step_s
    assert found.busy_s[0][2] == busy_s


def test_copies_to_a_peer_queue_behind_each_other() -> None:
    slow = machine(2, p2p_bytes_per_s=0.5)
    # Two seconds each: at the peer after 3, 5, 7 and 9 s.
    assert estimate(slow, stage(passed=1, way="peer"), stage(seat=1)).step_s == 10.0
    # Another stage's copies come after those of the first.
    twice = (stage(passed=1, way="peer"), stage(seat=1), stage(passed=1, way="peer"))
    assert estimate(slow, *twice, stage(seat=1)).step_s > 17.0


def test_weights_come_before_a_stage_computes_and_those_of_the_next_while_it_does() -> None:
    assert estimate(machine(), stage(weights=3)).step_s == 7.0
    # The next ones are there after 6 s, before the first stage ends.
    assert estimate(machine(), stage(weights=3), stage(weights=3)).step_s == 11.0
    assert estimate(machine(), stage(weights=3), stage(weights=6)).step_s == 13.0


def test_gradients_leave_after_the_last_microbatch_and_wait_for_a_slot() -> None:
    backward = stage(TaskKind.BACKWARD, gradients=5, slot=5)
    found = estimate(machine(), backward)
    assert found.step_s == 9.0 and found.busy_s[0][2] == 5.0
    # There are two slots: the third stage waits until those of the first have left, at 9 s.
    assert estimate(machine(), backward, backward, backward).step_s == 19.0
    one = replace(POLICY, gradient_slots=1)
    lean = sketch(Outline((backward, backward), 1, 1), machine(), one)
    assert lean.step_s == 18.0


def test_an_update_on_the_device_takes_compute_and_sends_weights_home() -> None:
    backward = stage(TaskKind.BACKWARD, gradients=6, slot=2, updates_here=True)
    # 4 s of computing, 6 bytes of gradients at 3 a second, 2 bytes of weights.
    assert estimate(machine(update_bytes_per_s=3.0), backward).step_s == 8.0


def test_updates_on_the_host_follow_each_other_or_wait_for_all_gradients() -> None:
    backward = stage(TaskKind.BACKWARD, gradients=1, slot=1, update_s=10.0)
    assert estimate(machine(), backward, backward).step_s == 25.0
    late = estimate(replace(machine(), updates_wait=True), backward, backward)
    assert late.step_s == 29.0 and late.host_s == 20.0


def test_devices_behind_a_switch_share_it_as_much_as_they_use_it_at_once() -> None:
    alone = machine(2)
    switch = Switch((0, 1), 1.0, 1.0)
    weights = (stage(weights=4), stage(seat=1, weights=4))
    gradients = [stage(TaskKind.BACKWARD, seat=seat, gradients=4, slot=4) for seat in (0, 1)]
    for stages in (weights, gradients):
        assert estimate(alone, *stages).step_s == 9.0
        # The other device copies for 4 of 9 s, and then takes half of what both get.
        shared = estimate(replace(alone, switches=(switch,)), *stages)
        assert shared.step_s == pytest.approx(5 + 4 * (1 + 4 / 9))


def test_all_copies_share_the_bandwidth_of_the_host_s_memory() -> None:
    server = machine(2)
    host = replace(server.host, memory_bytes_per_s=1.0)
    stages = (stage(weights=4), stage(seat=1, weights=4))
    # One byte a second in, one out (both directions are at hand), and the other's 4 of 9 s.
    found = estimate(replace(server, host=host), *stages)
    assert found.step_s == pytest.approx(5 + 4 * (1 + 1 + 4 / 9))


def test_devices_that_need_cores_slow_each_other_down_where_there_are_too_few() -> None:
    server = machine(2)
    for cores, slowdown in ((2, 1.0), (1, 1.8)):
        few = replace(server, cpu_share=1.0, host=replace(server.host, num_cores=cores))
        # The other device computes for 4 of 5 s.
        assert estimate(few, stage(), stage(seat=1)).step_s == pytest.approx(5 * slowdown)
