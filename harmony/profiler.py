"""Measures what the planner needs: seconds of layers, bandwidth of links, speed of the update.

Each distinct layer runs once or twice on real inputs; layers that do the same work share the
figure. Bytes are not measured but counted, on tensors without memory (`harmony.capture`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmony.capture import Captured, GuardError
from harmony.layergraph import Layer, LayerGraph
from harmony.machine import Device, Host, Machine
from harmony.planner.cost import CostTable, LayerCost
from harmony.planner.tasks import Pack, Task, TaskKind
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.hostmem import ArenaView, HostBuffer, available_host_nbytes
from harmony.runtime.optimizer import OptimizerFactory, PackOptimizer
from harmony.runtime.recall import Recall
from harmony.runtime.stage import Stage, Values
from harmony.units import aligned

_LINK_SAMPLE_NBYTES = 16 * 2**20
_UPDATE_SAMPLE = 1 << 20
_CONTENTION_WIDTH = 64
_CONTENTION_NBYTES = 8 * 2**20
_CONTENTION_PRODUCTS = 20
_REPEATS = 3
_ENOUGH_S = 0.2
"""A measurement that took this long is not repeated."""


KnownTimes = dict[tuple[str, int], tuple[float, float]]
"""Seconds of forward and backward by signature of the layer and number of samples."""


@dataclass(frozen=True)
class UpdateCost:
    """What the optimizer costs per element of a parameter.

    Attributes:
        seconds: of one update on the host.
        state_nbytes: bytes of its state.
    """

    seconds: float
    state_nbytes: float


def measure_update(factory: OptimizerFactory, options: Mapping[str, Any]) -> UpdateCost:
    """Time the optimizer on a parameter of a million elements and count its state."""
    param = nn.Parameter(torch.zeros(_UPDATE_SAMPLE))
    optimizer = PackOptimizer({"sample": param}, factory, options)
    param.grad = torch.zeros_like(param)
    optimizer.update([param])  # makes the state
    seconds = _best(lambda: optimizer.update([param]))
    held = [v for v in optimizer.full.state[param].values() if isinstance(v, torch.Tensor)]
    nbytes = sum(tensor.nbytes for tensor in held if tensor.numel() == param.numel())
    return UpdateCost(seconds / _UPDATE_SAMPLE, nbytes / _UPDATE_SAMPLE)


def measure_machine(
    contexts: Sequence[DeviceContext],
    memory_nbytes: int | None = None,
    host_memory_nbytes: int | None = None,
) -> Machine:
    """Measure the links of these devices and the memory of the host.

    Args:
        memory_nbytes: what Harmony may use of each device; all of it by default.
        host_memory_nbytes: what it may use of the host; what is free by default.
    """
    with streams_restored(contexts):
        return _measure_machine(contexts, memory_nbytes, host_memory_nbytes)


def _measure_machine(
    contexts: Sequence[DeviceContext], memory_nbytes: int | None, host_memory_nbytes: int | None
) -> Machine:
    devices = []
    for index, context in enumerate(contexts):
        peer = contexts[(index + 1) % len(contexts)]
        free, total = native.memory_info(context.device)
        usable = free - native.reserve_nbytes(context.device)
        if memory_nbytes is not None:
            usable = min(memory_nbytes, total)
        size = max(1 << 16, min(_LINK_SAMPLE_NBYTES, usable // 4))
        h2d, d2h, p2p = _measure_links(context, peer, size)
        name = str(context.device)
        devices.append(Device(name, usable, h2d, d2h, p2p))
    host_nbytes = host_memory_nbytes or available_host_nbytes()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = Host(host_nbytes, _measure_host_add(), cores or 1)
    is_virtual = native.is_virtual(contexts[0].device)
    share = _measure_contention(contexts, host.num_cores) if is_virtual else 0.0
    return Machine(tuple(devices), host, share)


def _measure_contention(contexts: Sequence[DeviceContext], num_cores: int) -> float:
    """Cores' worth of work that a virtual GPU wants, by how all of them slow each other down."""

    width = _CONTENTION_WIDTH
    memory = min(native.memory_info(context.device)[0] for context in contexts)
    columns = max(width, min(_CONTENTION_NBYTES, memory // 8) // (4 * width))

    def seconds(chosen: Sequence[DeviceContext]) -> float:
        pairs = []
        for context in chosen:
            context.enter()
            stream = context.use("compute")
            # As in a layer: few rows times weights too many for a core's own cache.
            w = torch.ones(width, columns, device=context.device)
            x = torch.ones(width, width, device=context.device)
            pair = context.new_event(timing=True), context.new_event(timing=True)
            stream.record_event(pair[0])
            for _ in range(_CONTENTION_PRODUCTS):
                torch.mm(x, w)
            stream.record_event(pair[1])
            pairs.append(pair)
        for context in chosen:
            context.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / len(pairs)

    if len(contexts) < num_cores:
        return 1.0
    seconds(contexts[:1])  # warm up
    slowdown = seconds(contexts) / max(seconds(contexts[:1]), 1e-9)
    return max(1.0, slowdown * num_cores / len(contexts))


def measure_layers(
    context: DeviceContext,
    code: Captured,
    graph: LayerGraph,
    weights: ArenaView,
    gradients: ArenaView,
    batches: Mapping[int, Values],
    nbytes: Mapping[int, Sequence[tuple[int, int, int]]],
    update: UpdateCost | None,
    known: KnownTimes,
) -> tuple[CostTable, float]:
    """Measure every distinct layer at every microbatch size.

    Returns:
        The costs, and the share of a host core that the device kept busy meanwhile, which is what
        `Machine.cpu_share` says of virtual GPUs.

    Args:
        batches: per microbatch size, the model's inputs for it, on the host.
        nbytes: per microbatch size and layer, the bytes of `LayerCost`.
        update: cost of the optimizer per element; None if the update is not Harmony's.
        known: times of layers that were measured before; new ones are added.
    """
    stage = Stage(context, code, graph, weights.layout, gradients.layout, guarded=False)
    table: list[dict[int, LayerCost]] = [{} for _ in graph.layers]
    meter = _CpuMeter()
    for num_samples, inputs in sorted(batches.items()):
        twins: dict[str, Layer] = {}
        env: Values = dict(inputs)
        for layer in graph.layers:
            key = (layer.signature, num_samples)
            twin = twins.setdefault(layer.signature, layer)
            if twin is layer and key in known:  # another capture has measured it
                forward_s, backward_s = known[key]
                env.update(_stand_ins(code, layer, num_samples))
            elif twin is layer:
                run = _LayerRun(context, stage, graph, layer, num_samples, meter)
                with streams_restored([context]):
                    try:
                        forward_s, backward_s = known[key] = run.measure(weights, env)
                    except GuardError:  # it does not run on these values: its time is not known
                        forward_s = backward_s = 0.0
                        env.update(_stand_ins(code, layer, num_samples))
            else:  # its inputs differ in value only, so its twin's outputs stand in for its own
                env.update({v: env[w] for v, w in zip(layer.outputs, twin.outputs, strict=True)})
                cost = table[twin.index][num_samples]
                forward_s, backward_s = cost.forward_s, cost.backward_s
            update_s = _update_seconds(layer, gradients, update)
            table[layer.index][num_samples] = LayerCost(
                forward_s, backward_s, update_s, *nbytes[num_samples][layer.index]
            )
    stage.set_slots([], [])
    return CostTable(tuple(table)), meter.share


def _stand_ins(code: Captured, layer: Layer, num_samples: int) -> Values:
    """Return tensors of the form of a layer's outputs."""
    found = {}
    for value in layer.outputs:
        shape, stride, dtype = code.value_form(value, num_samples)
        found[value] = torch.zeros(shape, dtype=dtype).as_strided(shape, stride)
    return found


class _CpuMeter:
    """How busy the process kept the cores while layers ran."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.wall_s = 0.0

    @property
    def share(self) -> float:
        """Cores in use on average, at most one."""
        return min(1.0, self.cpu_s / self.wall_s) if self.wall_s else 0.0

    def measure(self, run: Callable[[], object]) -> None:
        """Run something and add it to the account."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        run()
        self.cpu_s += time.process_time() - cpu_s
        self.wall_s += time.perf_counter() - wall_s


class _LayerRun:
    """Runs one layer alone, forward and backward, on the device."""

    def __init__(
        self,
        context: DeviceContext,
        stage: Stage,
        graph: LayerGraph,
        layer: Layer,
        num_samples: int,
        meter: _CpuMeter,
    ) -> None:
        self._context = context
        self._meter = meter
        self._stage = stage
        self._graph = graph
        self._layer = layer
        samples = (0, num_samples)
        pack = Pack(layer.index, layer.index + 1)
        self._forward = Task(TaskKind.FORWARD, pack, samples)
        self._backward = Task(TaskKind.BACKWARD, pack, samples)

    def measure(self, weights: ArenaView, env: Values) -> tuple[float, float]:
        """Return seconds of forward and backward; add the layer's outputs to ``env``."""
        context, layer, graph = self._context, self._layer, self._graph
        context.enter()
        context.use("compute")
        self._load(weights)
        inputs = {v: env[v].to(context.device) for v in layer.inputs}
        nothing = Recall.nothing()
        wanted = layer.outputs

        def forward() -> Values:
            return self._stage.forward(self._forward, 0, inputs, wanted, nothing)

        outputs = forward()
        env.update({v: tensor.cpu() for v, tensor in outputs.items()})
        above = {
            v: torch.ones_like(tensor)
            for v, tensor in outputs.items()
            if graph.values[v].requires_grad and v != graph.loss
        }
        made = [v for v in wanted if v == graph.loss]

        def backward() -> None:
            self._stage.begin_gradients(self._backward.pack, 0, 0)
            self._stage.backward(self._backward, 0, inputs, above, made, nothing, 1.0)

        forward_s = self._time(forward)
        both_s = self._time(backward)
        return forward_s, max(0.0, both_s - forward_s)

    def _load(self, weights: ArenaView) -> None:
        layer, graph, device = self._layer, self._graph, self._context.device
        regions = [weights.layout.layers[layer.index]]
        parts = [weights.layers(layer.index, layer.index + 1)]
        for index in layer.shared:
            regions.append(weights.layout.shared[index])
            parts.append(weights.shared(index))
        size = sum(aligned(region.nbytes) for region in regions)
        grads = aligned(layer.gradient_nbytes)
        grads += sum(aligned(graph.shared[i].gradient_nbytes) for i in layer.shared)
        self._stage.set_slots([], [])
        slot = torch.empty(size, dtype=torch.uint8, device=device)
        base = 0
        for region, pieces in zip(regions, parts, strict=True):
            for piece in pieces:
                at = base + piece.offset
                slot[at : at + piece.data.numel()].copy_(piece.data)
            base += aligned(region.nbytes)
        gradient = torch.empty(grads, dtype=torch.uint8, device=device)
        self._stage.set_slots([slot], [gradient])

    def _time(self, run: Callable[[], object]) -> float:
        stream = self._context.streams["compute"]

        def once() -> float:
            begin = self._context.new_event(timing=True)
            end = self._context.new_event(timing=True)

            def timed() -> None:
                stream.record_event(begin)
                run()
                stream.record_event(end)
                stream.synchronize()

            self._meter.measure(timed)
            return begin.elapsed_time(end) / 1e3

        return _best_of(once)


def _update_seconds(layer: Layer, gradients: ArenaView, update: UpdateCost | None) -> float:
    if update is None:
        return 0.0
    region = gradients.layout.layers[layer.index]
    return update.seconds * sum(torch.Size(p.shape).numel() for p in region.places.values())


def _measure_links(
    context: DeviceContext, peer: DeviceContext, nbytes: int
) -> tuple[float, float, float]:
    """Bytes per second host to device, device to host, and to a peer."""
    host = HostBuffer(nbytes, context.device, "the measurement of the links").tensor
    context.enter([peer.device])
    context.use("compute")
    here = torch.empty(nbytes, dtype=torch.uint8, device=context.device)
    there = torch.empty(nbytes, dtype=torch.uint8, device=peer.device)
    context.synchronize()

    def rate(stream: str, target: torch.Tensor, source: torch.Tensor) -> float:
        def once() -> float:
            begin = context.new_event(timing=True)
            end = context.new_event(timing=True)
            queue = context.use(stream)
            queue.record_event(begin)
            target.copy_(source, non_blocking=True)
            queue.record_event(end)
            queue.synchronize()
            return begin.elapsed_time(end) / 1e3

        return nbytes / max(_best_of(once), 1e-9)

    return rate("h2d", here, host), rate("d2h", host, here), rate("p2p", there, here)


def _measure_host_add() -> float:
    """Gradient bytes per second that the host adds to others."""
    a, b = torch.zeros(_UPDATE_SAMPLE), torch.zeros(_UPDATE_SAMPLE)
    return a.nbytes / max(_best(lambda: a.add_(b)), 1e-9)


def _best(run: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return _best_of(once)


def _best_of(once: Callable[[], float]) -> float:
    """Shortest of a few tries after one that warms up; a long one is believed at once."""
    first = once()
    if first > _ENOUGH_S:
        return first
    return min(once() for _ in range(_REPEATS))
