"""A quick estimate of a step's time, to tell which candidates are worth lowering.

It follows the same queues as `simulate`, but stage by stage: of the microbatches of a stage only
when the first and the last one start and end. Between the two everything is as regular as the
slower of what feeds it and what it does itself, so that a stage takes microseconds however many
microbatches it has.

Links that several devices share, host memory and cores are met on the average: one that is busy
for a share of the step slows the others down by that share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from harmony.core.machine import Machine
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.task_graph import interleaved
from harmony.planner.ir.tasks import TaskKind
from harmony.planner.search.outline import Outline, StageOutline

PASSES = 2
"""How often an estimate is made with what the one before says about shared resources."""


@dataclass
class _Rates:
    """What a device of the ring gets, per second; ``least`` while all others want it too."""

    h2d: float
    d2h: float
    p2p: float
    overhead_s: float
    update: float
    slowdown: float = 1.0
    least_h2d: float = math.inf
    least_d2h: float = math.inf


@dataclass
class _Lane:
    """Queues of one device, and what its stages have done so far.

    Attributes:
        compute, h2d, d2h, p2p: when each is free.
        coming: its stages whose weights come in, and the next one to fetch.
        arrived: when those weights are there.
        opened: when each stage that wants weights began to wait for them.
        gradients: when each pack's gradients have left.
        last_run_s: of the stage before.
        busy: seconds of compute, h2d and d2h.
    """

    rates: _Rates
    coming: list[StageOutline]
    compute: float = 0.0
    h2d: float = 0.0
    d2h: float = 0.0
    p2p: float = 0.0
    arrived: list[float] = field(default_factory=list)
    number: int = 0
    gradients: list[float] = field(default_factory=list)
    last_run_s: float = 0.0
    busy: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def fetch(self, now: float) -> None:
        """Queue the weights of the next stage that needs some."""
        seconds = self.coming[len(self.arrived)].weights / self.rates.h2d
        self.h2d = max(self.h2d, now) + seconds
        self.busy[1] += seconds
        self.arrived.append(self.h2d)


@dataclass(frozen=True)
class Sketch:
    """What a step is estimated to take.

    Attributes:
        compute_s: when the last device has computed all; copies and updates may go on.
        busy_s: per device of a ring the seconds that it computes, and its h2d and d2h links copy.
        host_s: seconds that updates and accumulations take on the host.
    """

    step_s: float
    compute_s: float
    busy_s: tuple[tuple[float, float, float], ...]
    host_s: float


def sketch(shape: Outline, machine: Machine, policy: Policy) -> Sketch:
    """Estimate the seconds of a step given in outline."""
    rates = [_rates(machine, seat) for seat in range(shape.ring)]
    found = _run(shape, machine, policy, rates)
    if machine.cpu_share or machine.switches or machine.host.memory_bytes_per_s:
        for _ in range(PASSES - 1):
            rates = [_contended(machine, shape, found, seat) for seat in range(shape.ring)]
            found = _run(shape, machine, policy, rates)
    return found


def step_s(
    shape: Outline, machine: Machine, policy: Policy, rounds: int, ends: Outline | None = None
) -> float:
    """Estimate the seconds of a step whose rounds are given in outline, each the same.

    Args:
        ends: of interleaved rounds the first and the last, where they differ.

    In all but the last one gradients are left on the host without an update; in all but the first
    they come back, as weights do. The one after begins where the compute of the one before ends.
    """
    if rounds == 1:
        return sketch(shape, machine, policy).step_s
    grown = replace(shape, stages=tuple(map(_grown, shape.stages)))
    middle = replace(shape, stages=tuple(map(_without_update, grown.stages)))
    if shape.interleaved:
        last = grown if ends is None else replace(ends, stages=tuple(map(_grown, ends.stages)))
        return _interleaved_s(middle, last, machine, policy, rounds)
    body_s = sketch(middle, machine, policy).compute_s
    return (rounds - 1) * body_s + sketch(grown, machine, policy).step_s


def _interleaved_s(
    middle: Outline, ends: Outline, machine: Machine, policy: Policy, rounds: int
) -> float:
    """FORWARD of the first round; then, in turn, BACKWARD of one and FORWARD of the next one;
    BACKWARD of the last.

    In between, copies have the time of a BACKWARD pack and of the FORWARDs behind it.
    """
    forward, backward = _by_kind(middle)
    first, last = _by_kind(ends)
    first_s = sketch(replace(ends, stages=first), machine, policy).step_s
    # BACKWARD of the first round recomputes more.
    more_s = sum(s.num_runs * s.run_s for s in last) - sum(s.num_runs * s.run_s for s in backward)
    pairs = interleaved(backward, forward)
    body_s = sum(_together_s(machine, (*stages, *others)) for stages, others in pairs)
    last_s = sketch(replace(ends, stages=last), machine, policy).step_s
    return first_s + (rounds - 1) * body_s + more_s + last_s


def _together_s(machine: Machine, stages: Sequence[StageOutline]) -> float:
    """Seconds of some stages of one device whose copies hide behind all that they compute."""
    device = machine.devices[0]
    compute = sum(s.num_runs * (s.run_s + device.task_overhead_s) for s in stages)
    coming = sum(s.weights + s.num_runs * s.inputs for s in stages)
    leaving = sum((s.slot if s.updates_here else s.gradients) for s in stages)
    leaving += sum(s.num_runs * s.outputs for s in stages)
    return max(compute, coming / device.h2d_bytes_per_s, leaving / device.d2h_bytes_per_s)


def _by_kind(shape: Outline) -> tuple[tuple[StageOutline, ...], tuple[StageOutline, ...]]:
    """FORWARD and BACKWARD stages."""
    forward = tuple(stage for stage in shape.stages if stage.kind is TaskKind.FORWARD)
    return forward, tuple(stage for stage in shape.stages if stage.kind is TaskKind.BACKWARD)


def _grown(stage: StageOutline) -> StageOutline:
    coming = 0 if stage.updates_here else stage.gradients
    return replace(stage, weights=stage.weights + coming)


def _without_update(stage: StageOutline) -> StageOutline:
    left = 0 if stage.updates_here else stage.gradients
    return replace(stage, gradients=left, update_s=0.0, updates_here=False)


def _rates(machine: Machine, seat: int) -> _Rates:
    device = machine.devices[seat]
    return _Rates(
        device.h2d_bytes_per_s,
        device.d2h_bytes_per_s,
        device.p2p_bytes_per_s,
        device.task_overhead_s,
        device.update_bytes_per_s,
    )


def _contended(machine: Machine, shape: Outline, found: Sketch, seat: int) -> _Rates:
    """Rates of a device while the others are as busy as an estimate says."""
    rates = _rates(machine, seat)
    span = max(found.step_s, 1e-12)

    def wanting(device: int, queue: int) -> float:
        """How likely another device uses a queue while this one uses its own.

        Replicas do the same at the same time.
        """
        other = device % shape.ring
        return 1.0 if other == seat else found.busy_s[other][queue] / span

    used = range(shape.ring * shape.replicas)
    h2d, d2h = rates.h2d, rates.d2h
    for switch in machine.switches:
        if seat in switch.devices:
            behind = [device for device in switch.devices if device in used]
            rates.least_h2d = min(rates.least_h2d, switch.h2d_bytes_per_s / len(behind))
            rates.least_d2h = min(rates.least_d2h, switch.d2h_bytes_per_s / len(behind))
            rates.h2d = min(rates.h2d, switch.h2d_bytes_per_s / sum(wanting(d, 1) for d in behind))
            rates.d2h = min(rates.d2h, switch.d2h_bytes_per_s / sum(wanting(d, 2) for d in behind))
    host, memory = min(1.0, found.host_s / span), machine.host.memory_bytes_per_s
    if memory:
        copies = sum(wanting(d, 1) * rates.h2d + wanting(d, 2) * rates.d2h for d in used)
        share = max(1.0, copies / max(1e-12, memory * (1.0 - 0.5 * host)))
        rates.h2d, rates.d2h = min(rates.h2d, h2d / share), min(rates.d2h, d2h / share)
    if machine.cpu_share:
        wanted = machine.cpu_share * sum(wanting(d, 0) for d in used) + host
        rates.slowdown = max(1.0, wanted / max(1, machine.host.num_cores))
    return rates


def _run(shape: Outline, machine: Machine, policy: Policy, rates: list[_Rates]) -> Sketch:
    lanes = [
        _Lane(rates[seat], [s for s in shape.stages if s.seat == seat and s.weights])
        for seat in range(shape.ring)
    ]
    host_s = worked_s = late_s = 0.0
    arrival = (0.0, 0.0)
    for stage in shape.stages:
        lane = lanes[stage.seat]
        ends = _run_stage(lane, stage, arrival, policy)
        arrival = _hand_on(lane, stage, ends, direct=machine.peer_links == "direct")
        if stage.kind is TaskKind.BACKWARD and stage.gradients:
            ready_s = _finish(lane, stage)
            work_s = (shape.replicas - 1) * stage.gradients / machine.host.accumulate_bytes_per_s
            update_s = stage.update_s * lane.rates.slowdown
            if machine.updates_wait:
                late_s += update_s
            else:
                work_s += update_s
            if work_s:
                host_s = max(host_s, ready_s) + work_s
                worked_s += work_s
    over = max(host_s, *(max(lane.compute, lane.d2h, lane.p2p) for lane in lanes))
    busy = tuple((lane.busy[0], lane.busy[1], lane.busy[2]) for lane in lanes)
    compute_s = max(lane.compute for lane in lanes)
    return Sketch(over + late_s, compute_s, busy, worked_s + late_s)


def _run_stage(
    lane: _Lane, stage: StageOutline, arrival: tuple[float, float], policy: Policy
) -> tuple[float, float]:
    """Run all microbatches of a stage; return when the first and the last ended."""
    rates, count = lane.rates, stage.num_runs
    ahead = min(policy.lookahead, count - 1)
    run_s = stage.run_s * rates.slowdown + rates.overhead_s
    opened, ready = lane.compute, lane.compute
    if stage.weights:
        while len(lane.arrived) <= lane.number:
            lane.fetch(opened)
        ready = max(ready, lane.arrived[lane.number])
        lane.number += 1
    leaves = stage.gradients and not stage.updates_here
    if leaves and len(lane.gradients) >= policy.gradient_slots:
        ready = max(ready, lane.gradients[-policy.gradient_slots])
    input_s = stage.inputs / rates.h2d
    if stage.inputs:
        issued = max(0.0, opened - ahead * lane.last_run_s)
        lane.h2d = max(lane.h2d, issued) + input_s
        ready = max(ready, lane.h2d)
        lane.h2d += ahead * input_s
    start = max(ready, arrival[0])
    # The next weights go in front of the inputs that are not fetched yet.
    limit = lane.number + policy.weight_slots - (1 if stage.weights else 0)
    while len(lane.arrived) < min(limit, len(lane.coming)):
        lane.fetch(opened)
    rest = count - 1 - ahead
    end = max(start + count * run_s, arrival[1] + run_s)
    if stage.inputs and rest > 0:
        lane.h2d = max(lane.h2d, start)
        end = max(end, lane.h2d + input_s + rest * run_s, lane.h2d + rest * input_s + run_s)
        lane.h2d = max(lane.h2d + rest * input_s, end - (ahead + 1) * run_s)
    output_s = stage.outputs / rates.d2h
    if output_s > run_s and rest > 0:
        # What is on its way out holds its memory: compute waits for it.
        end = max(end, max(lane.d2h, start + run_s) + rest * output_s + run_s)
    if stage.burst:
        # One copy has as long as the Runs that lie between it and the saved one. The other
        # devices of a ring run the same microbatch a little before and after.
        forward = stage.kind is TaskKind.FORWARD
        rate = min(rates.d2h, rates.least_d2h) if forward else min(rates.h2d, rates.least_h2d)
        late_s = stage.burst / rate - min(policy.lookahead, count - 1) * run_s
        end += stage.bursts * max(0.0, late_s)
    lane.busy[0] += count * run_s
    lane.busy[1] += count * input_s
    lane.compute, lane.last_run_s = end, run_s
    return start + run_s, end


def _hand_on(
    lane: _Lane, stage: StageOutline, ends: tuple[float, float], *, direct: bool
) -> tuple[float, float]:
    """When what the first and the last microbatch made is where the next stage reads it."""
    rates, rest = lane.rates, stage.num_runs - 1
    first, last = ends
    if stage.outputs:
        seconds = stage.outputs / rates.d2h
        first_out = max(lane.d2h, first) + seconds
        lane.d2h = max(first_out + rest * seconds, last + seconds)
        lane.busy[2] += stage.num_runs * seconds
        if stage.way == "host":
            back = stage.passed / rates.h2d
            return first_out + back, lane.d2h + back
    if stage.way == "peer" and stage.passed:
        seconds = stage.passed / rates.p2p
        if not direct:
            lane.d2h = max(lane.d2h + stage.num_runs * seconds, last + seconds)
            lane.busy[2] += stage.num_runs * seconds
        first = max(lane.p2p, first) + seconds
        lane.p2p = max(first + rest * seconds, last + seconds)
        return first, lane.p2p
    return first, last


def _finish(lane: _Lane, stage: StageOutline) -> float:
    """Update a pack, or send its gradients off; return when the host has what it needs."""
    moved = stage.gradients
    if stage.updates_here:
        lane.compute += stage.gradients / max(1.0, lane.rates.update)
        moved = stage.slot
    seconds = moved / lane.rates.d2h
    lane.d2h = max(lane.d2h, lane.compute) + seconds
    lane.busy[2] += seconds
    if not stage.updates_here:
        lane.gradients.append(lane.d2h)
    return lane.d2h
