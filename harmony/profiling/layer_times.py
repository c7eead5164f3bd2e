"""Measures seconds of layers, alone on a device.

Each distinct layer runs once or twice on real inputs; layers that do the same work share the
figure. Bytes are not measured but counted, on tensors without memory (`harmony.capture`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from harmony.capture import Captured, Footprint, GuardError
from harmony.capture.graph.trace import StepKind
from harmony.core.layergraph import Layer, LayerGraph
from harmony.core.units import aligned
from harmony.errors import ExecutionError, HarmonyError, text_of
from harmony.planner.ir.tasks import Pack, Task, TaskKind
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.profiling.server import best_of
from harmony.profiling.update_times import UpdateCost
from harmony.runtime import interrupts, native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.exec.stage import Stage, Values
from harmony.runtime.host.arena import ArenaView
from harmony.runtime.step.recompute import ReplayState

Seconds = tuple[float, float, float]
"""Of a layer's forward, backward, and products (a recompute given their results saves these)."""


@dataclass
class KnownTimes:
    """What was measured of layers, of this run's captures or kept from an earlier one.

    Attributes:
        seconds: by signature of the layer and number of samples.
        cpu_share: share of a host core that the device kept busy in the first measurement; None
            before that.
    """

    seconds: dict[tuple[str, int], Seconds] = field(default_factory=dict)
    cpu_share: float | None = None


def measure_layers(
    context: DeviceContext,
    code: Captured,
    graph: LayerGraph,
    weights: ArenaView,
    gradients: ArenaView,
    batches: Mapping[int, Values],
    nbytes: Mapping[int, Sequence[Footprint]],
    update: UpdateCost | None,
    known: KnownTimes,
) -> tuple[CostTable, float]:
    """Measure every distinct layer at every microbatch size.

    Returns:
        The costs, and how many host cores the device kept busy meanwhile, with the thread that
        issues: `Machine.cpu_share` of virtual GPUs.

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
        # What the forward really makes of these samples: along the recorded path, no stand-ins.
        true = set(inputs) if not _decides(code, num_samples) else set[int]()
        for layer in graph.layers:
            interrupts.check()
            key = (layer.signature, num_samples)
            twin = twins.setdefault(layer.signature, layer)
            if twin is layer and key in known.seconds:  # another capture, or run, has measured it
                seconds = known.seconds[key]
                env.update(_stand_ins(code, layer, num_samples))
            elif twin is layer:
                run = _LayerRun(context, stage, graph, layer, num_samples, meter)
                found = run.measured(weights, env, true)
                if found is not None:
                    seconds = known.seconds[key] = found
                else:
                    seconds = (0.0, 0.0, 0.0)
                    env.update(_stand_ins(code, layer, num_samples))
            else:  # its inputs differ in value only, so its twin's outputs stand in for its own
                env.update({v: env[w] for v, w in zip(layer.outputs, twin.outputs, strict=True)})
                cost = table[twin.index][num_samples]
                seconds = cost.forward_s, cost.backward_s, cost.products_s
            update_s = _update_seconds(layer, gradients, update)
            table[layer.index][num_samples] = LayerCost(
                *seconds[:2], update_s, *nbytes[num_samples][layer.index], seconds[2]
            )
    stage.set_slots([], [])
    if known.cpu_share is None:  # what is known already took no time of the meter's
        known.cpu_share = meter.share
    return CostTable(tuple(table)), known.cpu_share


class _NotOnTheseValuesError(Exception):
    """A layer does not run on the values that it was given, so its time is not known."""


def _decides(code: Captured, num_samples: int) -> bool:
    """Whether Python has looked at values, so that other values may take another path."""
    return any(step.kind is StepKind.GUARD for step in code.trace_for(num_samples).steps)


@contextmanager
def _naming(layer: Layer, device: torch.device, true_inputs: bool) -> Iterator[None]:
    """Say which layer it was that raised, if its inputs were what it gets in training."""
    try:
        yield
    except GuardError as error:
        raise _NotOnTheseValuesError from error
    except (HarmonyError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if native.is_lost(device):
            where = f"layer {layer.index} ({layer.name}), measured on the first batch,"
            raise native.device_lost(where, error, "No parameter has changed") from error
        if not true_inputs:
            raise _NotOnTheseValuesError from error
        raise ExecutionError(
            f"layer {layer.index} ({layer.name}) failed on the first batch, when its time was"
            f" to be measured. {type(error).__name__}: {text_of(error)}. No parameter has changed",
            layer.name,
        ) from error


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
        """Cores in use on average.

        More than one, since the thread that issues takes some of a core beside the device's.
        """
        return self.cpu_s / self.wall_s if self.wall_s else 0.0

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

    def measured(self, weights: ArenaView, env: Values, true: set[int]) -> Seconds | None:
        """Return seconds of the layer, and add its outputs to ``env``.

        Args:
            true: the values of ``env`` that are what the layers get in training; outputs that are
                made of such are added.

        Returns:
            None if it does not run on the values that it was given.
        """
        is_true = true.issuperset(self._layer.inputs)
        with streams_restored([self._context]):
            try:
                with _naming(self._layer, self._context.device, is_true):
                    seconds = self._measure(weights, env)
            except _NotOnTheseValuesError:
                return None
        true.update(self._layer.outputs if is_true else ())
        return seconds

    def _measure(self, weights: ArenaView, env: Values) -> Seconds:
        context, layer, graph = self._context, self._layer, self._graph
        context.enter()
        context.use("compute")
        self._load(weights)
        inputs = {v: env[v].to(context.device) for v in layer.inputs}
        nothing = ReplayState.nothing()
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
            self._stage.gather(self._backward.pack, 0, 0, begins=True)
            self._stage.backward(self._backward, 0, inputs, above, made, nothing, (1.0, 1.0))

        forward_s = self._time(forward)
        both_s = self._time(backward)
        kept = self._stage.forward_keeping(self._forward, 0, inputs, wanted, nothing)[1]
        rest_s = forward_s
        if kept.memory.sizes:
            rest_s = self._time(
                lambda: self._stage.forward_keeping(
                    self._forward, 0, inputs, wanted, nothing, kept
                )
            )
        return forward_s, max(0.0, both_s - forward_s), max(0.0, forward_s - rest_s)

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

        return best_of(once, cold=not native.is_virtual(self._context.device))


def _update_seconds(layer: Layer, gradients: ArenaView, update: UpdateCost | None) -> float:
    if update is None:
        return 0.0
    region = gradients.layout.layers[layer.index]
    return update.seconds * sum(torch.Size(p.shape).numel() for p in region.places.values())
