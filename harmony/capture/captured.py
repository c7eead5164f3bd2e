"""A captured model: its LayerGraph, and its layers as something that can be run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harmony.capture.footprint import Footprint, bindable, measure, pretending, stand_in
from harmony.capture.graph import BuiltGraph, Sizes, build_graph, check_same_structure
from harmony.capture.inputs import Batch
from harmony.capture.layers import changed_storages, cut_layers
from harmony.capture.params import ParamInfo, dense_stride, describe_buffers, describe_parameters
from harmony.capture.replay import Values, run_step
from harmony.capture.skeleton import Skeleton
from harmony.capture.structure import Structure
from harmony.capture.tape import StepKind, Tape, ValueRef
from harmony.capture.trace import NEEDS_VALUES, Tracer
from harmony.errors import CaptureError
from harmony.layergraph import LayerGraph


@dataclass
class _LayerSteps:
    """Where the layers lie on the tapes.

    Attributes:
        starts: index of the first step of each layer, and of the end.
        changes: per layer, the storages that it changes in place.
    """

    starts: tuple[int, ...]
    changes: tuple[frozenset[int], ...]

    @staticmethod
    def of(tape: Tape, starts: tuple[int, ...]) -> _LayerSteps:
        ends = (*starts[1:], len(tape.steps))
        ranges = zip(starts, ends, strict=True)
        changes = tuple(changed_storages(tape.steps[low:high], tape) for low, high in ranges)
        return _LayerSteps((*starts, len(tape.steps)), changes)


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
        starts: tuple[int, ...],
        has_loss: bool,
    ) -> None:
        params = describe_parameters(template.root)
        buffers = describe_buffers(template.root)
        built = build_graph(sizes, starts, template, params, buffers, has_loss)
        self.graph: LayerGraph = built.graph
        self.params: list[ParamInfo] = built.params
        self.buffers: list[ParamInfo] = built.buffers
        self.num_samples = batch.num_samples
        self._built: BuiltGraph = built
        self._tracer = tracer
        self._template = template
        self._batch = batch
        self._layers = _LayerSteps.of(sizes.tape, starts)
        self._tapes = dict(zip(sizes.num_samples, (sizes.tape, sizes.other), strict=True))
        self._ids = {number: index for index, number in enumerate(built.numbers)}
        self._tape_lock = threading.Lock()

    def ensure(self, num_samples: int) -> None:
        """Trace the forward for microbatches of this size, unless that was done before.

        Raises:
            CaptureError: if the forward takes other steps for this size.
        """
        self._tape(num_samples)

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
        tape = self._tape(num_samples)
        keep = {self._built.numbers[value] for value in wanted}
        values = self._inputs(tape, first, last, env)
        for layer in range(first, last):
            if at_layer is not None:
                at_layer(layer)
            self._run_layer(tape, layer, skeleton, values, keep)
        return {self._ids[number]: values[number] for number in keep}

    def _run_layer(
        self,
        tape: Tape,
        layer: int,
        skeleton: Skeleton,
        values: Values,
        keep: set[int],
        guarded: bool = True,
    ) -> None:
        for index in range(self._layers.starts[layer], self._layers.starts[layer + 1]):
            step = tape.steps[index]
            if guarded or step.kind is not StepKind.GUARD:
                run_step(step, values, skeleton)
            for number in tape.dead_after[index]:
                if number not in keep:
                    values.pop(number, None)

    def flatten_inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], targets: Any = None
    ) -> Values:
        """Return the tensors of a whole batch, by value.

        Raises:
            CaptureError: naming the argument that differs from what was captured.
        """
        leaves = self._batch.match(args, kwargs, targets)
        (tape, *_) = self._tapes.values()
        numbered = zip(tape.inputs, leaves, strict=True)
        return {
            self._ids[number]: leaf
            for number, leaf in numbered
            if number is not None and number in self._ids
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
        tape = self._tape(num_samples)
        if tape.host_program:
            values = {self._built.numbers[value]: t for value, t in inputs.items()}
            with torch.no_grad():
                for step in tape.host_program:
                    run_step(step, values, self._template)

    def unflatten_output(self, values: Mapping[int, torch.Tensor]) -> Any:
        """Return what the model returns, made of the given output values."""
        (tape, *_) = self._tapes.values()
        leaves = [
            values[self._ids[leaf.id]] if isinstance(leaf, ValueRef) else leaf
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
        known = self._tape(num_samples).values[self._built.numbers[value]]
        return known.shape, dense_stride(known.shape, known.stride), known.dtype

    def costs_nbytes(self, num_samples: int) -> list[Footprint]:
        """Return per layer ``(forward_nbytes, saved_nbytes, backward_nbytes)``.

        Measured on fake tensors, once for each signature: what PyTorch's eager mode allocates, in
        blocks of 512 bytes. Scratch memory inside a kernel is not seen.
        """
        tape = self._tape(num_samples)
        measured: dict[str, Footprint] = {}
        for layer in self.graph.layers:
            if layer.signature not in measured:
                measured[layer.signature] = self._footprint(layer.index, tape)
        return [measured[layer.signature] for layer in self.graph.layers]

    def _footprint(self, layer: int, tape: Tape) -> Footprint:
        try:
            return self._measure(layer, tape, real=tape.real)
        except NEEDS_VALUES:
            return self._measure(layer, tape, real=True)

    def _measure(self, layer: int, tape: Tape, real: bool) -> Footprint:
        described = self.graph.layers[layer]
        skeleton = self.make_skeleton(tape.device)
        names = [info.name for info in self.tensors_of(layer)]
        names += [self.graph.shared[index].name for index in described.shared]
        with pretending(real):
            tensors = {
                name: bindable(skeleton.placeholder(name), tape.device, real) for name in names
            }
            skeleton.bind(tensors)
            inputs = {
                value: stand_in(
                    tape.values[self._built.numbers[value]],
                    tape.device,
                    self.graph.values[value].requires_grad,
                )
                for value in described.inputs
            }

            def run(env: Values) -> Values:
                values = self._inputs(tape, layer, layer + 1, env)
                keep = {self._built.numbers[value] for value in described.outputs}
                self._run_layer(tape, layer, skeleton, values, keep, guarded=False)
                return {self._ids[number]: values[number] for number in keep}

            return measure(run, inputs, tensors, frozenset(described.outputs))

    def _inputs(self, tape: Tape, first: int, last: int, env: Values) -> Values:
        """Return what layers read from earlier ones; what they change in place as a clone."""
        changed = frozenset[int]().union(*self._layers.changes[first:last])
        values = {}
        for value in self.graph.pack_inputs(first, last):
            if value not in env:
                name = self.graph.values[value].name
                raise CaptureError(
                    f"layers [{first}:{last}] read value {value} ({name}), which was not given"
                )
            number = self._built.numbers[value]
            in_place = tape.values[number].storage in changed
            values[number] = env[value].clone() if in_place else env[value]
        return values

    def _slice(self, value: int, tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
        dim = self.graph.values[value].batch_dim
        return tensor if dim is None else tensor.narrow(dim, low, high - low)

    def _tape(self, num_samples: int) -> Tape:
        tape = self._tapes.get(num_samples)
        if tape is None:
            with self._tape_lock:
                tape = self._tapes.get(num_samples) or self._tracer.trace(num_samples)
                (reference, *_) = self._tapes.values()
                check_same_structure(reference, tape, (self.num_samples, num_samples))
                self._tapes[num_samples] = tape
        return tape


def first_tapes(tracer: Tracer, num_samples: int) -> Sizes:
    """Trace the given batch and another size, to see what depends on the number of samples."""
    other = num_samples // 2 if num_samples >= 4 else 2 * num_samples
    while True:
        leaves = tracer.leaves
        tapes = tracer.trace(num_samples), tracer.trace(other)
        if tracer.leaves == leaves:
            check_same_structure(*tapes, (num_samples, other))
            return Sizes(*tapes, (num_samples, other))


def layer_starts(tape: Tape, template: Skeleton) -> tuple[int, ...]:
    """Cut a tape into layers."""
    nbytes = {info.name: info.nbytes for info in describe_parameters(template.root)}
    return cut_layers(tape, nbytes)
