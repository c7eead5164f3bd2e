"""ZeRO-3 with everything on the host: every GPU gathers every layer for every microbatch.

Weights, gradients and optimizer state lie on the host, in one shard a GPU (ZeRO, SC 2020;
ZeRO-Infinity, SC 2021). For each forward and each backward of each microbatch a GPU fetches its
shard of the layer and gets the others' from their GPUs; a layer's gradients are summed over the
GPUs, each of which sends its shard to the host, where it is added to those of the microbatches
before. The update runs on the host when the last backward is over. The inputs of the layers stay
on the GPU, or wait on the host where they do not fit, and each forward is run again.

The layers of the next two tasks are gathered while one computes: all copies are hidden as well as
such a system can.
"""

from __future__ import annotations

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.schedule import HOST_STREAM, Op
from harmony.planner.predict.cost import CostTable, update_s
from harmony.planner.predict.flows import Activities
from harmony.planner.predict.links import Links
from research.baselines.baselines import Outcome, num_microbatches, outcome_of

_SLOTS = 2
"""Layers that a GPU holds at once: one computes, one is on its way."""


def zero3_step(
    graph: LayerGraph, costs: CostTable, machine: Machine, minibatch: int, size: int
) -> Outcome:
    """A step of ZeRO-3 offload, with recompute.

    Args:
        size: samples of a microbatch; divides each GPU's share of the minibatch.

    Raises:
        DoesNotFitError: if a layer, with the next, does not fit.
        ConfigError: if the minibatch cannot be divided.
    """
    count = num_microbatches(minibatch, machine.num_devices, size)
    zero = _Zero3(graph, costs, machine, size)
    for index in range(count):
        zero.microbatch(index)
    zero.update()
    return outcome_of(zero.activities, zero.links, 0, zero.traffic, size)


class _Zero3:
    """The activities of a step, the same on every GPU."""

    def __init__(self, graph: LayerGraph, costs: CostTable, machine: Machine, size: int) -> None:
        self.graph = graph
        self.table = costs
        self.costs = [costs.layer(i, size) for i in range(graph.num_layers)]
        self.machine = machine
        self.size = size
        self.links = Links(machine)
        self.activities = Activities()
        self.traffic: dict[tuple[str, str], int] = {}
        self.devices = range(machine.num_devices)
        self.stash = [
            sum(graph.values[v].nbytes(size) for v in layer.inputs) for layer in graph.layers
        ]
        self.offloads = self._check_memory()
        self.tasks: list[list[int]] = [[] for _ in self.devices]
        self.landed: list[int] = []
        self.leaving: dict[int, list[int]] = {}

    def microbatch(self, index: int) -> None:
        """Forward and backward of one microbatch on every GPU."""
        layers = range(self.graph.num_layers)
        self.leaving.clear()
        for layer in layers:
            ends = self._compute(layer, self.costs[layer].forward_s, self._gather(layer))
            if self.offloads:
                copies = self._copies(Op.SWAP_OUT, "stash", self.stash[layer], ends)
                self.leaving[layer] = copies
        for layer in reversed(layers):
            cost, waits = self.costs[layer], self._gather(layer)
            if self.offloads:
                fetched = self._copies(Op.SWAP_IN, "stash", self.stash[layer], self._issued())
                waits += fetched + self.leaving[layer]
            ends = self._compute(layer, cost.forward_s + cost.backward_s, waits)
            self._scatter(layer, ends, is_first=index == 0)

    def update(self) -> None:
        """Update every layer on the host, when all gradients are there."""
        waits = list(self.landed)
        for layer in range(self.graph.num_layers):
            seconds = update_s(self.table, [layer])
            nbytes = self.graph.gradient_nbytes([layer])
            units, path = self.links.update_units(seconds, nbytes)
            self.activities.add(
                (HOST_STREAM,), waits, seconds=seconds, units=units, resources=path
            )
            waits = []

    def _check_memory(self) -> bool:
        """Whether the inputs of the layers have to wait on the host."""
        limit = min(device.memory_nbytes for device in self.machine.devices)
        needed = 0
        for layer, cost in zip(self.graph.layers, self.costs, strict=True):
            around = self.stash[layer.index]
            around += sum(self.graph.values[v].nbytes(self.size) for v in layer.outputs)
            workspace = cost.saved_nbytes + max(cost.backward_nbytes, cost.forward_nbytes)
            needed = max(needed, 2 * around + workspace)
        weights = [self.graph.weight_nbytes([i]) for i in range(self.graph.num_layers)]
        gradients = [self.graph.gradient_nbytes([i]) for i in range(self.graph.num_layers)]
        needed += _SLOTS * (max(weights) + max(gradients))
        if needed > limit:
            raise DoesNotFitError(
                f"a layer and the next need {format_bytes(needed)}, the GPU has"
                f" {format_bytes(limit)}. Use a smaller microbatch"
            )
        return needed + sum(self.stash) > limit

    def _issued(self) -> list[int]:
        """Tasks that have to be over before a copy for the next task takes their memory."""
        return [tasks[-_SLOTS] for tasks in self.tasks if len(tasks) >= _SLOTS]

    def _gather(self, layer: int) -> list[int]:
        """Fetch the shards of a layer's weights and exchange them; return what to wait for."""
        nbytes = self.graph.weight_nbytes([layer])
        shard = nbytes // len(self.devices)
        fetched = self._copies(Op.SWAP_IN, "weights", shard, self._issued())
        return self._exchange("weights", nbytes - shard, fetched)

    def _scatter(self, layer: int, ends: list[int], *, is_first: bool) -> None:
        """Sum a layer's gradients over the GPUs, and add the shards to those on the host."""
        nbytes = self.graph.gradient_nbytes([layer])
        if not nbytes:
            return
        shard = nbytes // len(self.devices)
        summed = self._exchange("gradients", nbytes - shard, ends)
        copies = self._copies(Op.SWAP_OUT, "gradients", shard, summed)
        if is_first:
            self.landed += copies
            return
        seconds = nbytes / self.machine.host.accumulate_bytes_per_s
        units, path = self.links.accumulate_units(seconds, nbytes)
        self.landed.append(
            self.activities.add(
                (HOST_STREAM,), copies, seconds=seconds, units=units, resources=path
            )
        )

    def _compute(self, layer: int, seconds: float, waits: list[int]) -> list[int]:
        ends = []
        units, path = self.links.compute_units(seconds)
        for device in self.devices:
            lane = ((device, "compute"),)
            done = self.activities.add(lane, waits, seconds=seconds, units=units, resources=path)
            self.tasks[device].append(done)
            ends.append(done)
        return ends

    def _copies(self, op: Op, kind: str, nbytes: int, after: list[int]) -> list[int]:
        """One copy on every GPU."""
        way = "h2d" if op is Op.SWAP_IN else "d2h"
        self._count(way, kind, nbytes * len(self.devices))
        return [
            self.activities.add(
                ((device, way),), after, units=nbytes, resources=self.links.path(op, device)
            )
            for device in self.devices
        ]

    def _exchange(self, kind: str, nbytes: int, after: list[int]) -> list[int]:
        """Every GPU sends and gets ``nbytes``, all at the same time, in a ring."""
        if len(self.devices) == 1 or not nbytes:
            return after
        self._count("p2p", kind, nbytes * len(self.devices))
        lanes = tuple((device, "p2p") for device in self.devices)
        path = tuple(f"gpu{device}.p2p" for device in self.devices)
        return [self.activities.add(lanes, after, units=nbytes, resources=path)]

    def _count(self, link: str, kind: str, nbytes: int) -> None:
        self.traffic[link, kind] = self.traffic.get((link, kind), 0) + nbytes
