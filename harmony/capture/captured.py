"""A captured model: its LayerGraph, and its layers as something that can be run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from harmony.capture.footprint import Footprint, bindable, measure, pretending, stand_in
from harmony.capture.graph import Sizes, build_graph
from harmony.capture.inputs import Batch
from harmony.capture.layered import LayeredTape, check_same_layers, difference
from harmony.capture.layers import cut_layers
from harmony.capture.params import ParamInfo, dense_stride, describe_buffers, describe_parameters
from harmony.capture.replay import Values, run_step
from harmony.capture.skeleton import Skeleton
from harmony.capture.structure import Structure
from harmony.capture.tape import StepKind, Tape, ValueRef
from harmony.capture.trace import NEEDS_VALUES, Tracer
from harmony.errors import CaptureError
from harmony.layergraph import LayerGraph


class Captured:
    """A model as layers.

    Values are named by their ids in ``graph``. There is a tape for each number of samples that
    was asked for, all with the same layers.

    Attributes:
        graph: what the model is, for the planner.
        params: parameters in the order of the arena: by layer, what only that layer uses first,
            then what it is the first of several layers to use.
        buffers: buffers likewise. A buffer that several layers use is a ``SharedParam`` without
            gradient.
        num_samples: samples of the batch that the model was captured with.
    """

    def __init__(
        self,
        tracer: Tracer,
        template: Skeleton,
        batch: Batch,
        sizes: Sizes,
        has_loss: bool,
    ) -> None:
        params = describe_parameters(template.root)
        buffers = describe_buffers(template.root)
        self._param_nbytes = {info.name: info.nbytes for info in params}
        self._reference = self._cut(sizes.tape)
        built = build_graph(sizes, self._reference, template, params, buffers, has_loss)
        self.graph: LayerGraph = built.graph
        self.params: list[ParamInfo] = built.params
        self.buffers: list[ParamInfo] = built.buffers
        self.num_samples = batch.num_samples
        self._tracer = tracer
        self._template = template
        self._batch = batch
        self._traced_for = sizes.num_samples[0]
        self._tapes = {self._traced_for: self._reference}
        self._lock = threading.Lock()

    def ensure(self, num_samples: int) -> None:
        """Trace the forward for microbatches of this size, unless that was done before.

        Raises:
            CaptureError: if the layers exchange other values for this size.
        """
        self._layered(num_samples)

    def make_skeleton(self, device: torch.device) -> Skeleton:
        """Return a copy of the module tree without parameter memory, to run layers with."""
        return Skeleton(self._template.root, device)

    def tensors_of(self, layer: int) -> list[ParamInfo]:
        """Parameters and buffers that only this layer uses, in the order of the arena."""
        return [info for info in (*self.params, *self.buffers) if info.layer == layer]

    def run(
        self,
        first: int,
        last: int,
        skeleton: Skeleton,
        env: Values,
        num_samples: int,
        *,
        wanted: Iterable[int],
        at_layer: Callable[[int], None] | None = None,
    ) -> Values:
        """Run layers ``first`` to ``last - 1``, with or without gradients, on any device.

        Interior values are let go at their last use. An input that a layer changes in place is
        cloned first.

        Args:
            skeleton: has the parameters of these layers bound.
            env: at least the values that these layers read from earlier ones.
            num_samples: samples of the microbatch.
            wanted: values to return: outputs of these layers.
            at_layer: called with each layer's index before it runs.
        """
        layered = self._layered(num_samples)
        keep = {layered.crossing[value] for value in wanted}
        values = self._inputs(layered, first, last, env)
        for layer in range(first, last):
            if at_layer is not None:
                at_layer(layer)
            _run_layer(layered, layer, skeleton, values, keep)
        return {layered.ids[number]: values[number] for number in keep}

    def flatten_inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], targets: Any = None
    ) -> Values:
        """Return the tensors of a whole batch, by value.

        Raises:
            CaptureError: naming the argument that differs from what was captured.
        """
        leaves = self._batch.match(args, kwargs, targets)
        ids = self._reference.ids
        numbered = zip(self._reference.tape.inputs, leaves, strict=True)
        return {
            ids[number]: leaf for number, leaf in numbered if number is not None and number in ids
        }

    def split(self, inputs: Values, low: int, high: int) -> Values:
        """Return samples ``low`` to ``high - 1`` of the inputs, as views.

        Raises:
            CaptureError: if the forward would take another path for them than was recorded.
        """
        parts = {value: self._slice(value, tensor, low, high) for value, tensor in inputs.items()}
        self.check_guards(parts, high - low)
        return parts

    def check_guards(self, inputs: Values, num_samples: int) -> None:
        """Check what the forward's Python decided by looking at the inputs.

        Raises:
            CaptureError: naming the line whose outcome differs.
        """
        layered = self._layered(num_samples)
        if layered.tape.host_program:
            values = {layered.crossing[value]: tensor for value, tensor in inputs.items()}
            with torch.no_grad():
                for step in layered.tape.host_program:
                    run_step(step, values, self._template)

    def unflatten_output(self, values: Mapping[int, torch.Tensor]) -> Any:
        """Return what the model returns, made of the given output values."""
        tape = self._reference.tape
        leaves = [
            values[self._reference.ids[leaf.id]] if isinstance(leaf, ValueRef) else leaf
            for leaf in tape.outputs
        ]
        structure: Structure = tape.output_structure
        return structure.unflatten(leaves)

    def value_form(
        self, value: int, num_samples: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Return shape, stride and dtype of a value for a microbatch of this size.

        The stride is the one it had in the forward, so that kernels see the same layout when it
        comes back from the host; a view with gaps or overlaps is stored contiguous.
        """
        layered = self._layered(num_samples)
        known = layered.tape.values[layered.crossing[value]]
        return known.shape, dense_stride(known.shape, known.stride), known.dtype

    def costs_nbytes(self, num_samples: int) -> list[Footprint]:
        """Return per layer ``(forward_nbytes, saved_nbytes, backward_nbytes)``.

        Measured on fake tensors, once for each signature: what PyTorch's eager mode allocates, in
        blocks of 512 bytes. Scratch memory inside a kernel is not seen.
        """
        layered = self._layered(num_samples)
        measured: dict[str, Footprint] = {}
        for layer in self.graph.layers:
            if layer.signature not in measured:
                measured[layer.signature] = self._footprint(layer.index, layered)
        return [measured[layer.signature] for layer in self.graph.layers]

    def _footprint(self, layer: int, layered: LayeredTape) -> Footprint:
        try:
            return self._measure(layer, layered, real=layered.tape.real)
        except NEEDS_VALUES:
            return self._measure(layer, layered, real=True)

    def _measure(self, layer: int, layered: LayeredTape, real: bool) -> Footprint:
        described, device = self.graph.layers[layer], layered.tape.device
        skeleton = self.make_skeleton(device)
        names = [info.name for info in self.tensors_of(layer)]
        names += [self.graph.shared[index].name for index in described.shared]
        forms = {value: layered.tape.values[layered.crossing[value]] for value in described.inputs}

        def run(env: Values) -> Values:
            values = self._inputs(layered, layer, layer + 1, env)
            keep = {layered.crossing[value] for value in described.outputs}
            _run_layer(layered, layer, skeleton, values, keep, guarded=False)
            return {layered.ids[number]: values[number] for number in keep}

        with pretending(real):
            tensors = {name: bindable(skeleton.placeholder(name), device, real) for name in names}
            skeleton.bind(tensors)
            inputs = {
                value: stand_in(form, device, self.graph.values[value].requires_grad)
                for value, form in forms.items()
            }
            return measure(run, inputs, tensors, frozenset(described.outputs))

    def _inputs(self, layered: LayeredTape, first: int, last: int, env: Values) -> Values:
        """Return what layers read from earlier ones; what they change in place as a clone."""
        changed = frozenset[int]().union(*layered.changes[first:last])
        values = {}
        for value in self.graph.pack_inputs(first, last):
            if value not in env:
                name = self.graph.values[value].name
                raise CaptureError(
                    f"layers [{first}:{last}] read value {value} ({name}), which was not given"
                )
            number = layered.crossing[value]
            in_place = layered.tape.values[number].storage in changed
            values[number] = env[value].clone() if in_place else env[value]
        return values

    def _slice(self, value: int, tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
        dim = self.graph.values[value].batch_dim
        return tensor if dim is None else tensor.narrow(dim, low, high - low)

    def _layered(self, num_samples: int) -> LayeredTape:
        known = self._tapes.get(num_samples)
        if known is not None:
            return known
        with self._lock:
            if num_samples not in self._tapes:
                layered = self._cut(self._tracer.trace(num_samples))
                check_same_layers(self._reference, layered, (self._traced_for, num_samples))
                self._tapes[num_samples] = layered
            return self._tapes[num_samples]

    def _cut(self, tape: Tape) -> LayeredTape:
        return LayeredTape(tape, cut_layers(tape, self._param_nbytes))


def first_tapes(tracer: Tracer, num_samples: int) -> Sizes:
    """Trace two sizes that take the same path, to see what depends on the number of samples.

    One sample would not do: sizes of one broadcast, and count as contiguous.
    """
    size = max(num_samples, 2)
    others = [size // 2, 2 * size] if size >= 4 else [2 * size]
    for other in others:
        tapes = tracer.trace_both(size, other)
        found = difference(*tapes, (size, other))
        if found is None:
            return Sizes(*tapes, (size, other))
    raise CaptureError(str(found))


def _run_layer(
    layered: LayeredTape,
    layer: int,
    skeleton: Skeleton,
    values: Values,
    keep: AbstractSet[int],
    guarded: bool = True,
) -> None:
    tape = layered.tape
    for index in layered.ranges[layer]:
        step = tape.steps[index]
        if guarded or step.kind is not StepKind.GUARD:
            run_step(step, values, skeleton)
        for number in tape.dead_after[index]:
            if number not in keep:
                values.pop(number, None)
