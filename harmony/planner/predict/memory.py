"""Bytes that a schedule takes: per device at every Run, and on the host.

Memory of a device changes hands in the order of its compute stream only, so what is in use
follows from the program, whatever the timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Task, TaskKind, TensorKind, TensorRef
from harmony.planner.predict.cost import (
    CostTable,
    backward_workspace_nbytes,
    forward_peak_nbytes,
    forward_workspace_nbytes,
    transient_nbytes,
)

BLOCK_NBYTES = 512
"""Device allocators hand out multiples of this."""


_CHANGES = (Op.ALLOC, Op.DROP, Op.RUN)

STATE_TENSORS = 4
"""An optimizer keeps at most so many tensors a parameter: AMSGrad's three, and the step."""


@dataclass(frozen=True)
class Peak:
    """The most bytes in use on a device.

    Attributes:
        index: position of the instruction at the peak in the device's program, -1 if it is
            empty.
        slots, values, workspace: what the bytes are for.
    """

    nbytes: int = 0
    index: int = -1
    slots: int = 0
    values: int = 0
    workspace: int = 0


class Workspace:
    """Bytes that a Run takes while it runs, remembered per pack and microbatch size."""

    def __init__(self, graph: LayerGraph, costs: CostTable | None) -> None:
        self.graph = graph
        self.costs = costs
        self.known: dict[tuple[object, ...], int] = {}

    def nbytes(self, step: Instruction) -> int:
        """Bytes beyond a Run's weights, gradients, inputs and outputs; 0 without costs."""
        task, writes = step.task, step.writes
        if task is not None and task.kind is TaskKind.UPDATE:
            return self.graph.update_nbytes(task.pack.first, task.pack.last)
        if self.costs is None or task is None:
            return 0
        if any(ref.kind is TensorKind.SAVED for ref in (*step.reads, *writes)):
            return self._beside_saved(task)
        written = tuple(ref.first for ref in writes if ref.kind is TensorKind.VALUE)
        key = (task.kind, task.pack, task.num_samples, written)
        if key not in self.known:
            of = backward_workspace_nbytes
            if task.kind is TaskKind.FORWARD:
                of = forward_workspace_nbytes
            layers = range(task.pack.first, task.pack.last)
            self.known[key] = of(self.graph, self.costs, layers, task.num_samples, written)
        return self.known[key]

    def _beside_saved(self, task: Task) -> int:
        """What is saved counts as a tensor of its own; what comes and goes is left."""
        key = (task.kind, task.pack, task.num_samples, "saved")
        if key not in self.known:
            assert self.costs is not None
            layers = range(task.pack.first, task.pack.last)
            of = transient_nbytes if task.kind is TaskKind.BACKWARD else forward_peak_nbytes
            self.known[key] = of(self.graph, self.costs, layers, task.num_samples)
        return self.known[key]


def device_peak(schedule: Schedule, index: int, graph: LayerGraph, workspace: Workspace) -> Peak:
    """The most bytes in use on a device, and when."""
    slots = slots_nbytes(schedule, index, graph)
    peak = Peak(slots, -1, slots)
    for at, values, extra in device_usage(schedule, index, graph, workspace):
        if slots + values + extra > peak.nbytes:
            peak = Peak(slots + values + extra, at, slots, values, extra)
    return peak


def slots_nbytes(schedule: Schedule, index: int, graph: LayerGraph) -> int:
    """Bytes that weights, gradients and optimizer state take on a device, in use or not."""
    spec = schedule.devices[index]
    slots = sum(s.count * _blocks(s.nbytes) for s in (spec.weight_slots, spec.gradient_slots))
    return slots + sum(resident_nbytes(ref, graph) for ref in spec.resident)


def device_usage(
    schedule: Schedule, index: int, graph: LayerGraph, workspace: Workspace
) -> Iterator[tuple[int, int, int]]:
    """Yield the bytes in use on a device beside `slots_nbytes`, in the order of its program.

    Yields:
        The position of an instruction that changes them, the bytes of values after it began, and
        the workspace that it takes while it runs.
    """
    found = schedule.devices[index].found
    alive = {ref: _blocks(ref.nbytes(graph)) for ref in found}
    values = sum(alive.values())
    for at, step in enumerate(schedule.programs[index]):
        if step.op not in _CHANGES:
            continue
        for ref in _taken(step):
            if ref.is_value and ref not in alive:
                alive[ref] = _blocks(ref.nbytes(graph))
                values += alive[ref]
        if step.op is Op.DROP and step.ref is not None:
            values -= alive.pop(step.ref, 0)
        runs = step.op is Op.RUN and step.task is not None
        yield at, values, workspace.nbytes(step) if runs else 0


def resident_nbytes(ref: TensorRef, graph: LayerGraph) -> int:
    """Bytes that something resident takes on its device.

    An optimizer takes memory for each tensor of a parameter's state by itself.
    """
    nbytes = _blocks(ref.nbytes(graph))
    if ref.kind is TensorKind.STATE:
        tied = graph.shared_in(ref.first, ref.last)
        params = sum(len(layer.params) for layer in graph.layers[ref.first : ref.last])
        nbytes += (params + len(tied)) * STATE_TENSORS * BLOCK_NBYTES
        nbytes += sum(_blocks(graph.shared[k].state_nbytes) for k in tied)
    return nbytes


def _taken(step: Instruction) -> tuple[TensorRef, ...]:
    if step.op is Op.ALLOC and step.ref is not None:
        return (step.ref,)
    return step.writes if step.op is Op.RUN else ()


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


def stash_nbytes(schedule: Schedule, graph: LayerGraph) -> int:
    """Bytes of host memory for values and gradients of values.

    Each lives until the step ends, or until a later round writes over it.
    """
    out: dict[TensorRef, TensorRef | None] = {}
    for program in schedule.programs:
        for step in program:
            if step.op is Op.SWAP_OUT and step.ref is not None and step.ref.is_value:
                out.setdefault(step.ref, step.over)
    return sum(ref.nbytes(graph) for ref, over in out.items() if over is None)


def arena_nbytes(graph: LayerGraph) -> int:
    """Bytes of host memory for parameters, their masters, gradients and optimizer state."""
    weights = graph.weight_nbytes() + graph.master_nbytes()
    return weights + graph.gradient_nbytes() + graph.state_nbytes()


def inputs_nbytes(schedule: Schedule, graph: LayerGraph) -> int:
    """Bytes of host memory for the inputs of the minibatch."""
    return sum(graph.values[v].nbytes(schedule.minibatch) for v in graph.input_ids)


def stages_nbytes(schedule: Schedule) -> int:
    """Bytes of host memory for parts of gradients that wait there to be added."""
    return sum(device.stages.total_nbytes for device in schedule.devices)


def host_nbytes(schedule: Schedule, graph: LayerGraph) -> int:
    """Bytes of host memory that a step takes: parameters, gradients, optimizer state, the
    inputs of the minibatch, the values that go through the host, and the staging buffers."""
    extra = inputs_nbytes(schedule, graph) + stages_nbytes(schedule)
    return arena_nbytes(graph) + extra + stash_nbytes(schedule, graph)
