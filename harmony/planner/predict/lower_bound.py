"""What no plan can beat: the least time that a step takes on a machine, and because of what.

Each bound counts only what every plan must do, spread over all devices as well as can be:

    compute   every layer forward and backward for every sample, nothing recomputed, at the
              microbatch size where a sample is cheapest
    latency   one microbatch through all layers and back
    h2d, d2h  weights come in once and gradients leave once, unless they can stay on the devices;
              then what the devices have no room for comes in, and new weights leave
    update    all updates on the host, one after the other, unless devices can update
    memory    what host memory carries for all of that
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.planner.ir.tasks import Phase
from harmony.planner.predict.cost import CostTable, update_s


@dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least, by what takes them."""

    seconds: dict[str, float]

    @property
    def step_s(self) -> float:
        """The largest of them."""
        return max(self.seconds.values(), default=0.0)

    @property
    def reason(self) -> str:
        """What sets it, in words."""
        name = max(self.seconds, key=lambda key: self.seconds[key], default="compute")
        return _REASONS[name]


_REASONS = {
    "compute": "all GPUs computing all the time, without recomputing anything",
    "latency": "one microbatch through all layers and back",
    "h2d": "what has to come from the host at the full speed of all links",
    "d2h": "what has to go to the host at the full speed of all links",
    "update": "the updates on the host, one after the other",
    "memory": "what host memory has to carry",
}


def lower_bound(
    graph: LayerGraph,
    costs: CostTable,
    machine: Machine,
    minibatch: int,
    phase: Phase = Phase.TRAIN,
) -> Bounds:
    """Return what a step of a minibatch takes at least, whatever the plan."""
    layers = [_cheapest(graph, costs, i, minibatch, phase) for i in range(graph.num_layers)]
    work = sum(each for each, _ in layers)
    overhead = min(device.task_overhead_s for device in machine.devices)
    found = {
        "compute": minibatch * work / machine.num_devices,
        "latency": sum(once for _, once in layers) + overhead,
    }
    coming, leaving, updated = _traffic(graph, machine, minibatch, phase)
    found["h2d"] = coming / _rate(machine, "h2d_bytes_per_s")
    found["d2h"] = leaving / _rate(machine, "d2h_bytes_per_s")
    moved = float(coming + leaving)
    if phase is Phase.TRAIN and updated:
        found["update"] = update_s(costs, range(graph.num_layers))
        moved += updated * machine.host.update_memory_factor
    if machine.host.memory_bytes_per_s:
        found["memory"] = moved / machine.host.memory_bytes_per_s
    return Bounds(found)


def _cheapest(
    graph: LayerGraph, costs: CostTable, index: int, most: int, phase: Phase
) -> tuple[float, float]:
    """Seconds of a layer per sample at its best microbatch size; of one microbatch at its best."""
    forward, backward = _parts(graph, index, phase)
    found = [(size, costs.layer(index, size)) for size in _turns(costs.by_layer[index], most)]
    each = forward * min(c.forward_s / size for size, c in found)
    each += backward * min(c.backward_s / size for size, c in found)
    once = forward * min(c.forward_s for _, c in found)
    once += backward * min(c.backward_s for _, c in found)
    return each, once


def _turns(measured: Iterable[int], most: int) -> list[int]:
    """Sizes among which the cheapest is: costs are linear between the measured ones."""
    return sorted({1, most, *(size for size in measured if 1 <= size <= most)})


def _parts(graph: LayerGraph, index: int, phase: Phase) -> tuple[bool, bool]:
    """Whether a layer must run forward, and backward."""
    if phase in (Phase.FORWARD, Phase.INFER):
        return True, False
    # In a chain something flows back through every layer after the first that is trained; what
    # branches off may get nothing, so only layers with gradients of their own count.
    trained = graph.layers[index].gradient_nbytes > 0
    return phase is Phase.TRAIN, trained  # a backward may find what its forward has kept


def _traffic(
    graph: LayerGraph, machine: Machine, minibatch: int, phase: Phase
) -> tuple[int, int, int]:
    """Bytes that must come to the devices and leave them; bytes of gradients updated on the host.

    Weights that can stay on devices between steps count as if they filled all of them.
    """
    inputs = sum(graph.values[v].nbytes(minibatch) for v in graph.input_ids)
    pairs = [(x.weight_nbytes, x.gradient_nbytes) for x in graph.layers]
    pairs += [(s.nbytes, s.gradient_nbytes) for s in graph.shared]
    weights, gradients = sum(w for w, _ in pairs), sum(g for _, g in pairs)
    if phase in (Phase.FORWARD, Phase.INFER):
        return inputs + weights, 0, 0
    if phase is Phase.BACKWARD:
        # Frozen layers in front have no BACKWARD; those between trained ones are few.
        return sum(w for w, g in pairs if g), gradients, 0
    room = sum(device.memory_nbytes for device in machine.devices)
    if any(device.update_bytes_per_s for device in machine.devices):
        return inputs + max(0, weights - room), sum(min(pair) for pair in pairs), 0
    frozen = sum(w for w, g in pairs if not g)
    return inputs + weights - min(frozen, room), gradients, gradients


def _rate(machine: Machine, name: str) -> float:
    """Bytes per second of all links in one direction, behind the switches that they share."""
    alone = [float(getattr(device, name)) for device in machine.devices]
    total = sum(alone)
    for switch in machine.switches:
        behind = sum(alone[device] for device in switch.devices)
        total = min(total, total - behind + min(behind, float(getattr(switch, name))))
    return total
