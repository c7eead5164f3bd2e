"""The checker's own account of memory, written from what `LayerCost` says its figures mean.

The planner has an account too (`harmony.planner.predict.memory`), in closed formulas, to choose
by. This one shares no code with it: it follows a device's program, and a Run's layers one by one,
with the tensors that are alive. Tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from harmony.core.layergraph import LayerGraph, Value
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Task, TaskKind, TensorKind, TensorRef
from harmony.planner.predict.cost import CostTable

_BLOCK = 512
"""Device allocators hand out multiples of so many bytes."""

_STATES = 4
"""The most tensors that an optimizer keeps for a parameter, each with memory of its own."""


@dataclass(frozen=True)
class Peak:
    """The most bytes in use on a device.

    Attributes:
        index: position of the instruction at the peak in the device's program, -1 if none takes
            more than what is there all the time.
        fixed, values, workspace: slots and what is resident; what passes between tasks; what a
            Run takes while it runs.
    """

    index: int
    fixed: int
    values: int
    workspace: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.fixed + self.values + self.workspace


class PeakMemory:
    """Follows the memory of the devices of a schedule; without costs, Runs need no workspace."""

    def __init__(self, schedule: Schedule, graph: LayerGraph, costs: CostTable | None) -> None:
        self.schedule = schedule
        self.graph = graph
        self.costs = costs
        self.known: dict[tuple[object, ...], int] = {}

    def of(self, index: int) -> Peak:
        """Return the peak of a device."""
        fixed = self._fixed(index)
        top = Peak(-1, fixed, 0, 0)
        alive: dict[TensorRef, int] = {}
        for ref in self.schedule.devices[index].found:
            alive[ref] = _in_blocks(ref.nbytes(self.graph))
        in_use = sum(alive.values())
        for at, step in enumerate(self.schedule.programs[index]):
            born = step.writes
            if step.op is Op.ALLOC and step.ref is not None:
                born = (step.ref,)
            for ref in born:
                if ref.is_value and ref not in alive:
                    alive[ref] = _in_blocks(ref.nbytes(self.graph))
                    in_use += alive[ref]
            if step.op is Op.DROP and step.ref is not None and step.ref.is_value:
                in_use -= alive.pop(step.ref)
            workspace = 0 if step.task is None else self._workspace(step, step.task)
            if fixed + in_use + workspace > top.nbytes:
                top = Peak(at, fixed, in_use, workspace)
        return top

    def stash_nbytes(self) -> int:
        """Bytes of host memory that values take; one that takes another's has none of its own."""
        out: dict[TensorRef, int] = {}
        for program in self.schedule.programs:
            for step in program:
                if step.op is Op.SWAP_OUT and step.ref is not None and step.ref.is_value:
                    own = step.ref.nbytes(self.graph) if step.over is None else 0
                    out.setdefault(step.ref, own)
        return sum(out.values())

    def _fixed(self, index: int) -> int:
        """Bytes that are taken from the beginning to the end."""
        device = self.schedule.devices[index]
        fixed = device.weight_slots.count * _in_blocks(device.weight_slots.nbytes)
        fixed += device.gradient_slots.count * _in_blocks(device.gradient_slots.nbytes)
        for ref in device.resident:
            fixed += _in_blocks(ref.nbytes(self.graph))
            if ref.kind is TensorKind.STATE:
                fixed += self._state_of_its_own(ref.first, ref.last)
        return fixed

    def _state_of_its_own(self, first: int, last: int) -> int:
        """What state takes beyond that of the layers: shared parameters', and started blocks."""
        blocks = 0
        for layer in self.graph.layers[first:last]:
            blocks += _STATES * len(layer.params)
        nbytes = 0
        for param in self.graph.shared:
            if any(first <= layer < last for layer in param.layers):
                blocks += _STATES
                nbytes += _in_blocks(param.state_nbytes)
        return nbytes + blocks * _BLOCK

    def _workspace(self, step: Instruction, task: Task) -> int:
        """Bytes that a Run takes beside the weights, gradients and values that it names."""
        if task.kind is TaskKind.UPDATE:
            return self._update_nbytes(task)
        if self.costs is None:
            return 0
        saves = any(ref.kind is TensorKind.SAVED for ref in (*step.reads, *step.writes))
        handed = frozenset(ref.first for ref in step.writes if ref.kind is TensorKind.VALUE)
        key = (task.kind, task.pack, task.num_samples, saves, handed)
        if key not in self.known:
            walk = _Layers(self.graph, self.costs, task)
            if task.kind is TaskKind.FORWARD:
                self.known[key] = walk.forward(None if saves else handed)
            else:
                self.known[key] = walk.backward(None if saves else handed)
        return self.known[key]

    def _update_nbytes(self, task: Task) -> int:
        """Parameters are updated one after the other: the most that one of them takes."""
        most = 0
        for layer in self.graph.layers[task.pack.first : task.pack.last]:
            most = max(most, layer.update_nbytes)
        for param in self.graph.shared:
            if any(layer in task.pack for layer in param.layers):
                most = max(most, param.update_nbytes)
        return most


class _Layers:
    """One Run, layer by layer."""

    def __init__(self, graph: LayerGraph, costs: CostTable, task: Task) -> None:
        self.graph = graph
        self.costs = costs
        self.pack = task.pack
        self.size = task.num_samples

    def forward(self, handed: frozenset[int] | None) -> int:
        """The most bytes of a FORWARD that hands on some values; None: it saves everything."""
        alive: dict[int, int] = {}
        most = 0
        for i in self.pack:
            if handed is not None:
                alive.update({v.id: v.nbytes(self.size) for v in self._made(i, handed)})
            cost = self.costs.layer(i, self.size)
            most = max(most, sum(alive.values()) + cost.forward_nbytes)
            for v in [v for v in alive if self._last_reader(v) <= i]:
                del alive[v]
        return most

    def backward(self, handed: frozenset[int] | None) -> int:
        """The most bytes of a BACKWARD; with None its FORWARD saved all, and nothing is remade."""
        remade = 0
        if handed is not None:
            for i in self.pack:
                remade += self.costs.layer(i, self.size).saved_nbytes
                remade += sum(v.nbytes(self.size) for v in self._made(i, handed))
        most = 0
        # Gradients that arrive from later packs, then those that the pack's own layers pass on.
        arrived: dict[int, Value] = {}
        for i in self.pack:
            for v in (*self.graph.layers[i].inputs, *self.graph.layers[i].outputs):
                if self._last_reader(v) >= self.pack.last:
                    arrived[v] = self.graph.values[v]
        for i in reversed(range(self.pack.first, self.pack.last)):
            cost = self.costs.layer(i, self.size)
            passing = [v for v in arrived.values() if v.requires_grad and v.producer <= i]
            moving = sum(v.nbytes(self.size) for v in passing)
            most = max(most, cost.forward_nbytes, cost.backward_nbytes + moving)
            arrived.update({v: self.graph.values[v] for v in self.graph.layers[i].inputs})
        return remade + most

    def _made(self, layer: int, handed: frozenset[int]) -> list[Value]:
        """Values that a layer makes and that do not leave the pack."""
        outputs = self.graph.layers[layer].outputs
        return [self.graph.values[v] for v in outputs if v not in handed]

    def _last_reader(self, value: int) -> int:
        return max(self.graph.values[value].consumers, default=-1)


def _in_blocks(nbytes: int) -> int:
    return (nbytes + _BLOCK - 1) // _BLOCK * _BLOCK
