"""A captured model: its LayerGraph, and its layers as something that can be run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from harmony.capture.graph.assemble import Sizes, build_graph
from harmony.capture.graph.layered import LayerChanges, LayeredTrace, changes_of
from harmony.capture.graph.params import (
    ParamInfo,
    dense_stride,
    describe_buffers,
    describe_parameters,
    running_statistics,
)
from harmony.capture.graph.structure import Structure
from harmony.capture.graph.trace import Step, Trace, ValueRef
from harmony.capture.graph.trace_set import TraceSet
from harmony.capture.replay.inputs import Batch, Call
from harmony.capture.replay.pack_steps import Look, PackSteps
from harmony.capture.replay.replay import GuardError, Values, run_step
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.tracer import Tracer
from harmony.core.layergraph import LayerGraph
from harmony.errors import CaptureError

_SHOW_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_SHOW_STATISTICS |= {"buffers", "named_buffers", "_buffers", "get_buffer", "state_dict"}
_SHOW_STATISTICS |= {"eval", "train", "training", "__dict__", "vars"}
"""Names in a forward that may mean that it computes with running statistics in train mode."""


class Captured:
    """A model as layers.

    Values are named by their ids in ``graph``; inputs that only decisions of the forward's Python
    look at, which no layer reads, by negative ids of their own. There is a trace for each number
    of samples that was asked for, all with the same layers.

    Attributes:
        graph: what the model is, for the planner.
        params: parameters in the order of the arena: by layer, what only that layer uses first,
            then what it is the first of several layers to use.
        buffers: buffers likewise. A buffer that several layers use is a ``SharedParam`` without
            gradient.
        num_samples: samples of the batch that the model was captured with.
        only_size: the one number of samples that it runs for, or None where it is not the only.
        changes: by layer, what its forward leaves changed; layers that change nothing are left
            out.
        draws_on_host: whether a layer draws from random generators that all threads share.
        real: whether the trace is that of a run with real parameters.
        moved: Python attributes that functional code has changed in a dynamic run: module,
            attribute, value.
        guards: what has to be as it was for all this to stand.
        loss_reads: what a loss function reads that runs as it is in every step, if there is one.
        eager: why it stands for nothing, so that the module has to be run as it is; None if it
            does.
        traces: what its layers run, for each number of samples.
        template: the module tree without parameter memory.
    """

    def __init__(
        self,
        tracer: Tracer,
        template: ModuleShell,
        batch: Batch,
        sizes: Sizes,
        has_loss: bool,
    ) -> None:
        params = describe_parameters(template.root, template.masters)
        buffers = describe_buffers(template.root)
        nbytes = {info.name: info.nbytes for info in params}
        self.traces = TraceSet(tracer, sizes, nbytes, batch.num_samples)
        reference = self.traces.reference
        built = build_graph(sizes, reference, template, params, buffers, has_loss)
        self.graph: LayerGraph = built.graph
        self.params: list[ParamInfo] = built.params
        self.buffers: list[ParamInfo] = built.buffers
        self.num_samples = batch.num_samples
        self.only_size = batch.num_samples if sizes.only else None
        unread = tracer.outside.observed.names(of_torch=False).isdisjoint(_SHOW_STATISTICS)
        statistics = set(running_statistics(template.root) if unread else ())
        self.changes = dict(_changes(reference, statistics))
        self.draws_on_host = any(step.random_on_host for step in sizes.trace.steps)
        self.real = sizes.trace.real
        self.moved = sizes.trace.attributes
        moving = {a for change in self.changes.values() for a in change.attributes}
        moving.update((module, name) for module, name, _ in self.moved)
        replayed = sizes.trace.loss_call is None
        tracer.leave_settled()  # it stands while they are as the forward leaves them
        self.guards = tracer.outside.guards(moving, loss=replayed)
        self.eager = tracer.outside.refusal(self.guards, loss=replayed)
        self.loss_reads = None if replayed else tracer.outside.loss_reads()
        self._outside = tracer.outside
        self.template = template
        self._batch = batch
        self._packs: dict[tuple[int, int, int, tuple[int, ...]], PackSteps] = {}

    @property
    def trace(self) -> Trace:
        """The trace of the batch that the model was captured with."""
        return self.traces.reference.trace

    def bring_home(self, devices: Iterable[torch.device]) -> None:
        """Bring what the loss function has kept of a step from the devices to the host."""
        if self._outside.kept_by_loss is not None:
            for device in devices:
                self._outside.bring_home(device)

    def ensure(self, num_samples: int) -> None:
        """Trace the forward for microbatches of this size, unless that was done before.

        Raises:
            CaptureError: if the layers exchange other values for this size.
        """
        self.traces.of(num_samples)

    def foreseen(self, num_samples: int) -> bool:
        """Whether so many samples take the path of the others; so does what cannot be traced."""
        try:
            return self.traces.foreseen(num_samples)
        except CaptureError:  # whoever traces them meets it again
            return True

    def other_length(self, tracer: Tracer, batch: Batch) -> Sizes | None:
        """Trace a batch that may differ from this one in length (`TraceSet.other_length`)."""
        if self.only_size is not None or not self._batch.differs_in_length(batch):
            return None
        return self.traces.other_length(tracer, batch.num_samples)

    def make_shell(self, device: torch.device) -> ModuleShell:
        """Return a copy of the module tree without parameter memory, to run layers with."""
        return ModuleShell(self.template.root, device)

    def tensors_of(self, layer: int) -> list[ParamInfo]:
        """Parameters and buffers that only this layer uses, in the order of the arena."""
        return [info for info in (*self.params, *self.buffers) if info.layer == layer]

    def run(
        self,
        first: int,
        last: int,
        shell: ModuleShell,
        env: Values,
        num_samples: int,
        *,
        wanted: Iterable[int],
        at_layer: Callable[[int], None] | None = None,
        guarded: bool = True,
        look: Look | None = None,
    ) -> Values:
        """Run layers ``first`` to ``last - 1`` (see `pack`, and `PackSteps.run`)."""
        return self.pack(first, last, num_samples, wanted).run(shell, env, at_layer, guarded, look)

    def pack(self, first: int, last: int, num_samples: int, wanted: Iterable[int]) -> PackSteps:
        """Return what layers ``first`` to ``last - 1`` run, found once.

        Args:
            num_samples: samples of the microbatch.
            wanted: values to return: outputs of these layers.
        """
        key = (first, last, num_samples, tuple(wanted))
        found = self._packs.get(key)
        if found is None:
            layered = self.traces.of(num_samples)
            found = self._packs[key] = PackSteps.of(self.graph, layered, first, last, key[3])
        return found

    def flatten_inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], targets: Any = None
    ) -> Values:
        """Return the tensors of a whole batch, by value.

        Raises:
            CaptureError: naming the argument that differs from what was captured.
        """
        return self.inputs_of(Batch.of(args, kwargs, targets))

    def inputs_of(self, batch: Batch) -> Values:
        """Return the tensors of a whole batch, by value.

        Raises:
            CaptureError: naming the argument that differs from what was captured.
        """
        leaves = self._batch.match(batch)
        ids = self.traces.reference.ids
        numbered = zip(self.traces.reference.trace.inputs, leaves, strict=True)
        return {
            ids.get(number, _only_looked_at(number)): leaf
            for number, leaf in numbered
            if number is not None
        }

    def split(self, inputs: Values, low: int, high: int) -> Values:
        """Return samples ``low`` to ``high - 1`` of the inputs, as views.

        Raises:
            CaptureError: if the forward would take another path for them than was recorded.
        """
        parts = self.part(inputs, low, high)
        self.check_guards(parts, high - low)
        return parts

    def part(self, inputs: Values, low: int, high: int) -> Values:
        """Return samples ``low`` to ``high - 1`` of the inputs, whatever path they take."""
        return {value: self._slice(value, tensor, low, high) for value, tensor in inputs.items()}

    def part_of_call(self, call: Call, low: int, high: int) -> Call:
        """Return samples ``low`` to ``high - 1`` of a call."""
        return self._batch.part(*call, low, high)

    def stands_for(self, call: Call) -> bool:
        """Whether the trace is what the forward does for all samples of a call."""
        batch = Batch.of(*call)
        inputs = self.inputs_of(batch)
        try:
            self.check_guards(inputs, self._batch.count_samples(batch))
        except GuardError:
            return False
        return True

    def first_guard(self) -> str:
        """File and line of the first decision that the forward takes by looking at the inputs."""
        return self.traces.first_guard()

    def looks_at_inputs(self, num_samples: int) -> bool:
        """Whether the forward's Python decides by what is in so many samples."""
        return bool(self.traces.of(num_samples).trace.host_program)

    def check_guards(self, inputs: Values, num_samples: int) -> None:
        """Check what the forward's Python decided by looking at the inputs.

        Raises:
            CaptureError: naming the line whose outcome differs.
        """
        layered = self.traces.of(num_samples)
        if layered.trace.host_program:
            changes = any(step.mutated for step in layered.trace.host_program)
            values = {
                layered.crossing[value] if value >= 0 else _only_looked_at(value): tensor
                for value, tensor in inputs.items()
            }
            if changes:  # that is for the forward itself to do, once
                values = {number: tensor.clone() for number, tensor in values.items()}
            with torch.no_grad(), self._as_now(layered.trace.host_program):
                for step in layered.trace.host_program:
                    run_step(step, values, self.template)

    @contextmanager
    def _as_now(self, steps: Iterable[Step]) -> Iterator[None]:
        """Let steps read parameters and buffers as the module has them now."""
        names = {name for step in steps for name in step.state}
        now = {name: self._outside.tensor(name).detach().to("cpu") for name in names}
        self.template.bind(
            {name: held.to(self.template.placeholder(name).dtype) for name, held in now.items()}
        )
        try:
            yield
        finally:
            self.template.release(names)

    def unflatten_output(self, values: Mapping[int, torch.Tensor], num_samples: int) -> Any:
        """Return what the model returns for so many samples, made of the given output values."""
        layered = self.traces.reference
        if any(map(_may_count_samples, layered.trace.outputs)):
            layered = self.traces.of(num_samples)
        leaves = [
            values[layered.ids[leaf.id]] if isinstance(leaf, ValueRef) else leaf
            for leaf in layered.trace.outputs
        ]
        structure: Structure = layered.trace.output_structure
        return structure.unflatten(leaves)

    def value_form(
        self, value: int, num_samples: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Return shape, stride and dtype of a value for a microbatch of this size.

        The stride is the one it had in the forward, so that kernels see the same layout when it
        comes back from the host; a view with gaps or overlaps is stored contiguous.
        """
        layered = self.traces.of(num_samples)
        known = layered.trace.values[layered.crossing[value]]
        return known.shape, dense_stride(known.shape, known.stride), known.dtype

    def trace_for(self, num_samples: int) -> Trace:
        """Return the trace for microbatches of this size."""
        return self.traces.of(num_samples).trace

    def steps_of(self, layer: int, num_samples: int) -> list[Step]:
        """Return the steps of a layer for microbatches of this size."""
        return self.traces.of(num_samples).steps(layer)

    def _slice(self, value: int, tensor: torch.Tensor, low: int, high: int) -> torch.Tensor:
        if value >= 0:
            dim = self.graph.values[value].batch_dim
        else:
            leaf = self.traces.reference.trace.inputs.index(_only_looked_at(value))
            dim = self._batch.batch_dims[leaf]
        return tensor if dim is None else tensor.narrow(dim, low, high - low)


def _may_count_samples(leaf: Any) -> bool:
    """Whether an output is a value of Python that may be another for another number of samples."""
    return leaf is not None and not isinstance(leaf, (ValueRef, bool, type, torch.dtype))


def _only_looked_at(number: int) -> int:
    """Id of an input that no layer reads, from its number on the trace; and the other way round.

    Inputs have the same numbers on all traces.
    """
    return -1 - number


def _changes(
    reference: LayeredTrace, statistics: AbstractSet[str]
) -> Iterator[tuple[int, LayerChanges]]:
    """Yield what each layer changes; ``statistics`` are buffers that no output depends on."""
    for layer in range(reference.num_layers):
        changes = changes_of(reference.steps(layer))
        if changes.buffers or changes.attributes:
            feeds = not set(changes.buffers) <= statistics
            yield layer, replace(changes, feeds_outputs=feeds)
