"""What is estimated before anything is lowered, against the schedule that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest

from harmony.core.machine import Machine
from harmony.core.timeline import Timeline
from harmony.planner.ir.policy import LEAN, Policy
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Phase, StepSpec, TaskKind
from harmony.planner.lower.passes import lower
from harmony.planner.predict.memory import Workspace, device_peak, host_nbytes, stash_nbytes
from harmony.planner.predict.simulate import simulate
from harmony.planner.search import memory_estimate
from harmony.planner.search.outline import Outline, outline
from harmony.planner.search.packing import Packer
from harmony.planner.search.sketch import Sketch, sketch
from tests.toys import MIB, chain, packs, server, step, uniform_costs

_CHAIN = chain(8, weight=MIB, per_sample=64 * 1024)
GRAPH = replace(
    _CHAIN, layers=tuple(replace(x, saved_nbytes_per_sample=200_000) for x in _CHAIN.layers)
)
COSTS = uniform_costs(GRAPH)
PACKER = Packer(GRAPH, COSTS)
LOSSES_NBYTES = 8 * 4
"""The loss of each sample leaves, too: no outline counts those few bytes."""

ALL = packs(2, 4, 6, 8)
FORWARD = ALL[:-1]
PLAIN = step(8, 1, FORWARD, ALL)
SAVED = replace(PLAIN, saved=FORWARD)
SPECS = {
    "everything is recomputed": PLAIN,
    "forward microbatches are larger": step(8, 2, packs(3, 6), ALL, backward_size=1),
    "replicas": step(8, 1, FORWARD, ALL, replicas=2),
    "everything is saved": SAVED,
    "half of the microbatches are saved": replace(SAVED, saved_runs=4),
    "inference": step(8, 1, ALL, ALL, phase=Phase.INFER),
    "a forward alone": step(8, 1, ALL, ALL, phase=Phase.FORWARD),
    "a backward alone": step(8, 1, ALL, ALL, phase=Phase.BACKWARD),
}
POLICIES = (
    Policy(),
    LEAN,
    Policy(boundary="swap"),
    Policy(2, 2, 1, "host"),
    Policy(hold=1),
    Policy(3, 2, 4),
)


def machine(num_devices: int, rate: float) -> Machine:
    """Devices that can update what stays on them."""
    found = server(num_devices, memory=64 * MIB, rate=rate)
    return replace(found, devices=tuple(replace(d, update_bytes_per_s=5e9) for d in found.devices))


def policies(spec: StepSpec, num_devices: int) -> list[Policy]:
    """Policies for a step, also with what it can leave on a device or on the host."""
    # With more than two devices a pack's BACKWARD is where its FORWARD was only if mirrored.
    found = [replace(policy, mirror=bool(spec.saved) and num_devices > 2) for policy in POLICIES]
    if spec.saved:
        found += [replace(policy, offload=spec.saved[:2]) for policy in found]
    if spec.phase is Phase.TRAIN and len(spec.shares) == 1 and spec.forward_packs == FORWARD:
        if not spec.saved_runs:
            stay = ALL[-1:] if num_devices > 1 else ALL[-2:]
            found += [replace(policy, resident=stay) for policy in found[: len(POLICIES)]]
        if num_devices > 1:
            found += [replace(policy, mirror=True) for policy in POLICIES]
    return found


@dataclass(frozen=True)
class Both:
    """A step as it is estimated, and as it is simulated."""

    shape: Outline
    estimate: Sketch
    timeline: Timeline
    peaks: tuple[float, float]
    """Bytes of the fullest device: estimated, exact."""
    host: tuple[float, float]
    stash_nbytes: int


def both(spec: StepSpec, policy: Policy, server: Machine) -> Both:
    """Estimate a step, and lower and simulate it."""
    schedule = lower(build_tasks(GRAPH, spec), server, policy)
    shape = outline(PACKER, server, spec, policy)
    workspace = Workspace(GRAPH, COSTS)
    exact = max(
        device_peak(schedule, device, GRAPH, workspace).nbytes
        for device in range(server.num_devices)
    )
    return Both(
        shape,
        sketch(shape, server, policy),
        simulate(schedule, GRAPH, COSTS, server),
        (max(memory_estimate.peaks_nbytes(PACKER, shape, spec, policy)), exact),
        (memory_estimate.host_nbytes(PACKER, shape, spec), host_nbytes(schedule, GRAPH)),
        stash_nbytes(schedule, GRAPH),
    )


def traffic(timeline: Timeline) -> dict[str, int]:
    """Bytes by link."""
    found = dict.fromkeys(("h2d", "d2h", "p2p"), 0)
    for (link, _), nbytes in timeline.bytes_by().items():
        found[link] += nbytes
    return found


CASES = [(n, name) for n, name in product((1, 2, 4), SPECS) if n > 1 or name != "replicas"]


@pytest.mark.parametrize(("num_devices", "name"), CASES)
def test_an_outline_moves_the_bytes_of_the_schedule(num_devices: int, name: str) -> None:
    spec, server = SPECS[name], machine(num_devices, 1e9)
    for policy in policies(spec, num_devices):
        found = both(spec, policy, server)
        stages, exact = found.shape.stages, traffic(found.timeline)
        times = found.shape.replicas
        coming = times * sum(s.weights + s.inputs * s.num_runs for s in stages)
        # With more room what goes to the host may still be there when it is wanted again.
        deep = policy.weight_slots > 2
        assert coming == exact["h2d"] or (deep and coming > exact["h2d"])
        peer = sum(s.passed * s.num_runs for s in stages if s.way == "peer")
        assert times * peer == exact["p2p"]
        leaving = sum(s.slot if s.updates_here else s.gradients for s in stages)
        leaving = times * (leaving + sum(s.outputs * s.num_runs for s in stages))
        leaving += 0 if spec.phase is Phase.BACKWARD else LOSSES_NBYTES
        if deep or any(s.way == "host" for s in stages):
            # What goes to the next pack over the host is, in the schedule, the stash as well.
            assert exact["d2h"] <= leaving <= exact["d2h"] + found.stash_nbytes
        else:
            assert leaving == exact["d2h"]


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_outline_leaves_out_the_backward_of_frozen_layers_in_front(num_devices: int) -> None:
    graph, server = chain(8, weight=MIB, frozen=(0, 1, 2)), machine(num_devices, 1e9)
    costs = uniform_costs(graph)
    shape = outline(Packer(graph, costs), server, PLAIN, Policy())
    schedule = lower(build_tasks(graph, PLAIN), server, Policy())
    backward = [s.pack for s in shape.stages if s.kind is TaskKind.BACKWARD]
    assert backward == list(packs(2, 4, 6, 8)[:0:-1])
    exact = traffic(simulate(schedule, graph, costs, server))
    assert sum(s.weights + s.inputs * s.num_runs for s in shape.stages) == exact["h2d"]


@pytest.mark.parametrize(("num_devices", "name"), CASES)
def test_an_estimate_is_near_what_is_simulated(num_devices: int, name: str) -> None:
    spec = SPECS[name]
    # With fast links compute is what counts; with slow ones every queue does.
    for rate, least, most in ((1e9, 0.97, 1.02), (1e8, 0.9, 1.3)):
        server = machine(num_devices, rate)
        for policy in policies(spec, num_devices):
            found = both(spec, policy, server)
            assert least < found.estimate.step_s / found.timeline.step_s < most, policy
            assert 0.95 < found.peaks[0] / found.peaks[1] < 1.18, policy
            assert 1.0 <= (found.host[0] + LOSSES_NBYTES) / found.host[1] < 1.05, policy
            computing = sum(busy[0] for busy in found.estimate.busy_s) * found.shape.replicas
            lanes = [f"gpu{device}.compute" for device in range(num_devices)]
            exact = sum(
                span.duration_s
                for lane in lanes
                for span in found.timeline.on(lane)
                if "update" not in span.kind
            )
            assert computing == pytest.approx(exact)
