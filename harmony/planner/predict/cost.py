"""Seconds and bytes of layers, and of packs of them, at a microbatch size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from harmony.core.files import check_types
from harmony.core.layergraph import LayerGraph, Value
from harmony.errors import PlanError


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs for one microbatch.

    Attributes:
        forward_s: seconds of its forward, without keeping anything for a backward.
        backward_s: seconds of its backward, the recompute of its forward not included.
        update_s: seconds of the update of its parameters on the host (any microbatch size).
        forward_nbytes: the most bytes alive inside its forward beyond its weights, inputs and
            outputs.
        saved_nbytes: bytes that a forward with gradients keeps for the backward, beyond its
            weights, inputs and outputs.
        backward_nbytes: the most bytes alive inside its backward beyond its weights and their
            gradients, inputs, outputs, what was saved, and the gradient of its outputs; the
            gradient of its inputs counts.
        products_nbytes: bytes of the results of its forward's products (of matrices,
            convolutions, attention); 0 if they are not known.
        products_s: seconds of its forward that a recompute saves which is given those.
    """

    forward_s: float
    backward_s: float
    update_s: float
    forward_nbytes: int
    saved_nbytes: int
    backward_nbytes: int
    products_nbytes: int = 0
    products_s: float = 0.0

    def __add__(self, other: LayerCost) -> LayerCost:
        pairs = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return LayerCost(**pairs)


def interpolate(low: LayerCost, high: LayerCost, share: float) -> LayerCost:
    """Return the cost a ``share`` of the way from ``low`` to ``high`` (beyond 1: extrapolate)."""

    def between(name: str) -> Any:
        a, b = getattr(low, name), getattr(high, name)
        mixed = max(0.0, a + (b - a) * share)
        return mixed if isinstance(a, float) else round(mixed)

    return LayerCost(**{f.name: between(f.name) for f in fields(low)})


@dataclass(frozen=True)
class CostTable:
    """Costs of every layer at the microbatch sizes that were measured.

    Attributes:
        by_layer: per layer, microbatch size -> cost. Sizes between measured ones are
            interpolated linearly, sizes outside extrapolated from the nearest two.
    """

    by_layer: tuple[Mapping[int, LayerCost], ...]

    def layer(self, index: int, num_samples: int) -> LayerCost:
        """Cost of a layer for a microbatch of ``num_samples`` samples.

        Raises:
            PlanError: if nothing was measured for the layer.
        """
        measured = self.by_layer[index]
        if num_samples in measured:
            return measured[num_samples]
        sizes = sorted(measured)
        if not sizes:
            raise PlanError(f"layer {index} has no measured cost")
        if len(sizes) == 1:
            only = measured[sizes[0]]
            zero = LayerCost(0.0, 0.0, only.update_s, 0, 0, 0)
            return interpolate(zero, only, num_samples / sizes[0])
        at = min(max(bisect_left(sizes, num_samples), 1), len(sizes) - 1)
        low, high = sizes[at - 1], sizes[at]
        share = (num_samples - low) / (high - low)
        return interpolate(measured[low], measured[high], share)

    def to_json(self) -> list[dict[str, Any]]:
        """A plain list that ``from_json`` reads back."""
        layers = self.by_layer
        return [{str(size): asdict(cost) for size, cost in layer.items()} for layer in layers]

    @staticmethod
    def from_json(data: Sequence[Mapping[str, Any]]) -> CostTable:
        """Read what ``to_json`` wrote.

        Raises:
            TypeError, ValueError: if something is of another type, or makes no sense.
        """
        layers = [{int(size): LayerCost(**cost) for size, cost in layer.items()} for layer in data]
        for layer in layers:
            for size, cost in layer.items():
                check_types(cost, LayerCost)
                if size < 1 or min(asdict(cost).values()) < 0:
                    raise ValueError(f"a cost of {size} samples: {cost}")
        return CostTable(tuple(layers))


def forward_s(costs: CostTable, layers: Iterable[int], num_samples: int) -> float:
    """Seconds of a FORWARD of these layers for one microbatch."""
    return sum(costs.layer(i, num_samples).forward_s for i in layers)


def backward_s(costs: CostTable, layers: Iterable[int], num_samples: int) -> float:
    """Seconds of a BACKWARD of these layers for one microbatch, the recompute included."""
    found = (costs.layer(i, num_samples) for i in layers)
    return sum(cost.forward_s + cost.backward_s for cost in found)


def products_s(costs: CostTable, layers: Iterable[int], num_samples: int) -> float:
    """Seconds that a recompute of these layers saves which is given what their products made."""
    return sum(costs.layer(i, num_samples).products_s for i in layers)


def update_s(costs: CostTable, layers: Iterable[int]) -> float:
    """Seconds of an UPDATE of these layers on the host, whatever the microbatch size."""
    measured = (costs.by_layer[i] for i in layers)
    return sum(sizes[min(sizes)].update_s for sizes in measured if sizes)


def forward_workspace_nbytes(
    graph: LayerGraph, costs: CostTable, layers: range, num_samples: int, written: Container[int]
) -> int:
    """Most bytes that a FORWARD takes beyond its weights, inputs and the values it writes.

    A value that the pack does not write is given back after its last reader in the pack::

        max over layers i of   forward_nbytes(i) + values made by i or before, read by i or later
    """
    peak = 0
    inner = _inner_values(graph, layers, written)
    for i in layers:
        alive = sum(
            v.nbytes(num_samples)
            for v in inner
            if v.producer == i or (v.producer < i and v.consumers and v.consumers[-1] >= i)
        )
        peak = max(peak, alive + costs.layer(i, num_samples).forward_nbytes)
    return peak


def backward_workspace_nbytes(
    graph: LayerGraph, costs: CostTable, layers: range, num_samples: int, written: Container[int]
) -> int:
    """Most bytes that a BACKWARD takes beyond its weights, gradients, inputs and what it writes.

    Nothing that the recompute made counts as given back before the end, which holds however the
    backward is run::

        values made + sum of saved_nbytes(i)
            + max over layers i of   forward_nbytes(i)
                              or     backward_nbytes(i) + gradients on their way to i or before
    """
    inner = _inner_values(graph, layers, written)
    kept = sum(v.nbytes(num_samples) for v in inner)
    kept += sum(costs.layer(i, num_samples).saved_nbytes for i in layers)
    return kept + transient_nbytes(graph, costs, layers, num_samples)


def forward_peak_nbytes(
    graph: LayerGraph, costs: CostTable, layers: range, num_samples: int
) -> int:
    """Most bytes that a FORWARD takes beside what it saves for its backward."""
    return max(costs.layer(i, num_samples).forward_nbytes for i in layers)


def transient_nbytes(graph: LayerGraph, costs: CostTable, layers: range, num_samples: int) -> int:
    """Most bytes that come and go in a BACKWARD, beside what was saved and what was made::

    max over layers i of   forward_nbytes(i)
                      or   backward_nbytes(i) + gradients on their way to i or before
    """
    seen = {v for i in layers for v in (*graph.layers[i].inputs, *graph.layers[i].outputs)}
    touched = [graph.values[v] for v in seen]
    peak = 0
    for i in layers:
        cost = costs.layer(i, num_samples)
        coming = sum(
            v.nbytes(num_samples)
            for v in touched
            if v.requires_grad and v.producer <= i and v.consumers and v.consumers[-1] > i
        )
        peak = max(peak, cost.forward_nbytes, cost.backward_nbytes + coming)
    return peak


def _inner_values(graph: LayerGraph, layers: range, written: Container[int]) -> list[Value]:
    """Values that the layers make and do not write."""
    made = (graph.values[v] for i in layers for v in graph.layers[i].outputs)
    return [v for v in made if v.id not in written]
