"""Layers to packs: the fewest packs, balanced in time, that fit a device.

FORWARD and BACKWARD pack the layers independently (PVLDB 15(11), 2022): a BACKWARD keeps what
its layers save, so it needs smaller packs. A partition is found by dynamic programming over the
places where a pack may end: for every number of packs it is the one whose slowest pack is
fastest; where that leaves a choice, boundaries that carry few bytes are preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

from harmony.errors import DoesNotFitError
from harmony.layergraph import LayerGraph
from harmony.planner.cost import CostTable, LayerCost
from harmony.planner.policy import LEAN, Policy
from harmony.planner.tasks import Pack, TaskKind
from harmony.units import aligned, format_bytes

Number = TypeVar("Number", int, float)

MAX_CUTS = 64
"""A model of more layers is cut only at this many places, those where the fewest bytes cross."""


@dataclass(frozen=True)
class Budget:
    """What a device offers to the tasks of one kind.

    Attributes:
        microbatches: how many microbatches the device runs of each pack.
        parked: microbatches whose boundary values may wait on the device for their next pack.
        weight_nbytes, gradient_nbytes: slots are at least this large, for the other kind's packs.
    """

    memory_nbytes: int
    policy: Policy
    microbatches: int = 1
    parked: int = 0
    weight_nbytes: int = 0
    gradient_nbytes: int = 0


@dataclass(frozen=True)
class _Range:
    """Bytes of the layers of a range, for any microbatch size."""

    weights: int
    gradients: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Need:
    """Bytes that one pack needs on a device while its tasks run."""

    slots: int
    values: int
    workspace: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.slots + self.values + self.workspace

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.nbytes)} (weights and gradients {format_bytes(self.slots)},"
            f" values {format_bytes(self.values)}, workspace {format_bytes(self.workspace)})"
        )


class Packer:
    """Packs the layers of one model, for any kind of task, microbatch size and budget."""

    def __init__(self, graph: LayerGraph, costs: CostTable) -> None:
        self.graph = graph
        self.costs = costs
        self._ranges: dict[tuple[int, int], _Range] = {}
        self._layers: dict[int, _Layers] = {}

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Places where a pack may begin or end."""
        return _choose_cuts(self.graph)

    def need(self, kind: TaskKind, pack: Pack, num_samples: int, budget: Budget) -> Need:
        """Bytes that a pack's tasks need on a device, estimated from above.

        The checker has the last word, since it knows what else is on the device at that moment.
        """
        found = self._range(pack.first, pack.last)
        layers = self._sized(num_samples)
        policy = budget.policy
        gradients = found.gradients if kind is TaskKind.BACKWARD else 0
        slots = policy.weight_slots * max(aligned(found.weights), budget.weight_nbytes)
        slots += policy.gradient_slots * max(aligned(gradients), budget.gradient_nbytes)
        inputs, outputs = layers.nbytes(found.inputs), layers.nbytes(found.outputs)
        ahead = 1 + min(policy.lookahead, budget.microbatches - 1)
        if kind is TaskKind.FORWARD:
            values = ahead * (inputs + outputs)
            workspace = max(layers.forward[pack.first : pack.last])
        else:
            # The gradients of inputs and outputs are as large as they are.
            values = ahead * 2 * inputs + ahead * outputs
            saved = layers.saved[pack.last] - layers.saved[pack.first]
            workspace = saved + layers.nbytes(found.made)
            workspace += max(layers.backward[pack.first : pack.last])
        values += budget.parked * max(inputs, outputs)
        return Need(slots, values, workspace)

    def seconds(self, kind: TaskKind, pack: Pack, num_samples: int) -> float:
        """Seconds of one task of the pack."""
        layers = self._sized(num_samples)
        sums = layers.forward_s if kind is TaskKind.FORWARD else layers.backward_s
        return sums[pack.last] - sums[pack.first]

    def slot_nbytes(self, pack: Pack) -> tuple[int, int]:
        """Bytes of the pack's weights and of its gradients, shared parameters included."""
        found = self._range(pack.first, pack.last)
        return aligned(found.weights), aligned(found.gradients)

    def boundary_nbytes(self, pack: Pack, num_samples: int) -> tuple[int, int]:
        """Bytes of the values that enter the pack and of those that leave it."""
        found, layers = self._range(pack.first, pack.last), self._sized(num_samples)
        return layers.nbytes(found.inputs), layers.nbytes(found.outputs)

    def table(
        self, kind: TaskKind, num_samples: int, budget: Budget, max_packs: int
    ) -> PackingTable:
        """Solve for every end and every number of packs up to ``max_packs``."""
        cuts = self.cuts
        best: list[list[_Best | None]] = [[_Best(0.0, 0, -1)] + [None] * (len(cuts) - 1)]
        choices = [self._fitting(kind, j, num_samples, budget) for j in range(len(cuts))]
        for _ in range(max_packs):
            before, row = best[-1], [None] * len(cuts)
            best.append([_extend(before, choices[j]) for j, _ in enumerate(row)])
        return PackingTable(cuts, best)

    def _fitting(
        self, kind: TaskKind, end: int, num_samples: int, budget: Budget
    ) -> list[tuple[int, float, int]]:
        """Packs that end at cut ``end`` and fit: first cut, seconds, bytes of their inputs."""
        found = []
        layers = self._sized(num_samples)
        for first in range(end - 1, -1, -1):
            pack = Pack(self.cuts[first], self.cuts[end])
            need = self.need(kind, pack, num_samples, budget)
            if need.slots > budget.memory_nbytes:
                break  # slots only grow with the pack
            if need.nbytes <= budget.memory_nbytes:
                inputs = layers.nbytes(self._range(pack.first, pack.last).inputs)
                found.append((first, self.seconds(kind, pack, num_samples), inputs))
        return found

    def _range(self, first: int, last: int) -> _Range:
        if (first, last) not in self._ranges:
            graph = self.graph
            made = [v for i in range(first, last) for v in graph.layers[i].outputs]
            self._ranges[first, last] = _Range(
                graph.weight_nbytes(range(first, last)),
                graph.gradient_nbytes(range(first, last)),
                self._bytes(graph.pack_inputs(first, last)),
                self._bytes(graph.pack_outputs(first, last)),
                self._bytes(made),
            )
        return self._ranges[first, last]

    def _bytes(self, values: Sequence[int]) -> tuple[int, int]:
        chosen = [self.graph.values[v] for v in values]
        return sum(v.nbytes_fixed for v in chosen), sum(v.nbytes_per_sample for v in chosen)

    def _sized(self, num_samples: int) -> _Layers:
        if num_samples not in self._layers:
            self._layers[num_samples] = _Layers(self.graph, self.costs, num_samples)
        return self._layers[num_samples]


class _Layers:
    """Costs of all layers at one microbatch size, summed up from the first layer on.

    Attributes:
        forward_s, backward_s, saved: sums over the layers before each place.
        forward, backward: per layer the bytes beyond what its pack keeps anyway; the values
            that cross the layer count in full.
    """

    def __init__(self, graph: LayerGraph, costs: CostTable, num_samples: int) -> None:
        self.num_samples = num_samples
        table = [costs.layer(i, num_samples) for i in range(graph.num_layers)]
        self.forward_s = _sums([c.forward_s for c in table])
        self.backward_s = _sums([c.forward_s + c.backward_s for c in table])
        self.saved = _sums([c.saved_nbytes for c in table])
        crossing = [self.nbytes(pair) for pair in _crossing(graph)]
        self.forward = [self._forward(c, crossing, i) for i, c in enumerate(table)]
        self.backward = [
            max(c.forward_nbytes, c.backward_nbytes + crossing[i + 1])
            for i, c in enumerate(table)
        ]

    @staticmethod
    def _forward(cost: LayerCost, crossing: Sequence[int], layer: int) -> int:
        return cost.forward_nbytes + crossing[layer] + crossing[layer + 1]

    def nbytes(self, pair: tuple[int, ...]) -> int:
        """Bytes of values given as fixed bytes and bytes per sample."""
        return pair[0] + pair[1] * self.num_samples


@dataclass(frozen=True)
class _Best:
    """The best partition up to a cut: its slowest pack, bytes on its boundaries, last cut."""

    slowest_s: float
    crossing: int
    previous: int


def _extend(
    before: Sequence[_Best | None], choices: Sequence[tuple[int, float, int]]
) -> _Best | None:
    best: tuple[float, int, int] | None = None
    for first, seconds, inputs in choices:
        head = before[first]
        if head is None:
            continue
        found = (max(head.slowest_s, seconds), head.crossing + inputs, first)
        if best is None or found < best:
            best = found
    return None if best is None else _Best(*best)


@dataclass(frozen=True)
class PackingTable:
    """The best partitions of all beginnings of the model."""

    cuts: tuple[int, ...]
    best: list[list[_Best | None]]

    def fewest(self, end: int) -> int | None:
        """The fewest packs that cover layers 0 to ``end - 1``; None if none do."""
        at = self.cuts.index(end)
        return next((k for k, row in enumerate(self.best) if row[at] is not None), None)

    def packs(self, end: int, num_packs: int) -> tuple[Pack, ...] | None:
        """The best partition of layers 0 to ``end - 1`` into that many packs; None if none."""
        at, packs = self.cuts.index(end), list[Pack]()
        for k in range(num_packs, 0, -1):
            item = self.best[k][at] if k < len(self.best) else None
            if item is None:
                return None
            packs.append(Pack(self.cuts[item.previous], self.cuts[at]))
            at = item.previous
        return tuple(reversed(packs)) if at == 0 else None


def pack_layers(
    graph: LayerGraph,
    costs: CostTable,
    kind: TaskKind,
    num_samples: int,
    budget: Budget,
    num_packs: int | None = None,
) -> tuple[Pack, ...]:
    """Return the fewest packs that fit, or ``num_packs``, with the slowest as fast as can be.

    Raises:
        DoesNotFitError: if a layer does not fit even alone, or not into that many packs.
    """
    packer = Packer(graph, costs)
    table = packer.table(kind, num_samples, budget, num_packs or len(packer.cuts))
    count = num_packs or table.fewest(graph.num_layers)
    packs = None if count is None else table.packs(graph.num_layers, count)
    if packs is None:
        check_layers(packer, num_samples, budget)
        raise DoesNotFitError(
            f"the layers do not fit into {num_packs or 'any number of'} packs at a microbatch of"
            f" {num_samples} with {format_bytes(budget.memory_nbytes)} of GPU memory"
        )
    return packs


def check_layers(packer: Packer, num_samples: int, budget: Budget) -> None:
    """Refuse a layer that does not fit on a device even alone.

    Raises:
        DoesNotFitError: with the layer, its bytes, the limit and what to change.
    """
    lean = replace(budget, policy=LEAN, parked=0)
    for at, first in enumerate(packer.cuts[:-1]):
        pack = Pack(first, packer.cuts[at + 1])
        need = packer.need(TaskKind.BACKWARD, pack, num_samples, lean)
        if need.nbytes > budget.memory_nbytes:
            name = packer.graph.layers[first].name
            limit = format_bytes(budget.memory_nbytes)
            smaller = "" if num_samples == 1 else "use a microbatch of 1, or "
            raise DoesNotFitError(
                f"layer {first} ({name}) alone needs {need} at a microbatch of {num_samples};"
                f" the limit is {limit}. {smaller.capitalize()}give it more GPU memory"
                f" (--gpu-memory {suggest_memory(need.nbytes)}) or split the layer"
            )


def suggest_memory(nbytes: int) -> str:
    """A size to type, a little above ``nbytes``: ``"96MiB"``."""
    mib = -(-nbytes // 2**20)
    step = max(1, 2 ** (mib.bit_length() - 4))
    return f"{-(-mib // step) * step}MiB"


def _sums(items: Sequence[Number]) -> list[Number]:
    """Sums of the items before each place, and of all."""
    return list(accumulate(items, initial=type(items[0])(0)))


def _crossing(graph: LayerGraph) -> list[tuple[int, int]]:
    """Per place between layers the values that cross it: fixed bytes, bytes per sample."""
    fixed, per_sample = [0] * (graph.num_layers + 1), [0] * (graph.num_layers + 1)
    for value in graph.values:
        last = value.consumers[-1] if value.consumers else value.producer + 1
        for place in range(value.producer + 1, last + 1):
            fixed[place] += value.nbytes_fixed
            per_sample[place] += value.nbytes_per_sample
    return list(zip(fixed, per_sample, strict=True))


def _choose_cuts(graph: LayerGraph) -> tuple[int, ...]:
    """All places of a small model; of a large one the cheapest place of each stretch."""
    num_layers = graph.num_layers
    if num_layers <= MAX_CUTS:
        return tuple(range(num_layers + 1))
    crossing = [fixed + per_sample for fixed, per_sample in _crossing(graph)]
    cuts = [0]
    for stretch in range(1, MAX_CUTS):
        low = max(cuts[-1] + 1, (stretch * num_layers - num_layers // 2) // MAX_CUTS)
        high = min(num_layers, (stretch * num_layers + num_layers // 2) // MAX_CUTS + 1)
        if low < high:
            cuts.append(min(range(low, high), key=lambda place: (crossing[place], place)))
    return (*cuts, num_layers)
