"""Bytes and seconds of ranges of layers, in constant time from sums over the layers before.

A search asks about hundred thousands of ranges; adding up their layers each time would take all
of its time. What crosses a place between layers is a short list (one value in a chain), so what
enters and leaves a range is found from the lists of its two ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from harmony.core.layergraph import LayerGraph
from harmony.core.units import aligned
from harmony.planner.predict.cost import CostTable

Number = TypeVar("Number", int, float)


class Ranges:
    """Bytes of the layers of any range, for any microbatch size.

    Attributes:
        entering: per place the values that cross it: the next layer that reads one, its bytes.
        leaving: per place the values that cross it: the layer that made one, its bytes.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        layers = graph.layers
        self._weights = sums([layer.weight_nbytes for layer in layers])
        self._gradients = sums([layer.gradient_nbytes for layer in layers])
        self._shared = [(s.layers, s.nbytes, s.gradient_nbytes) for s in graph.shared]
        places = range(graph.num_layers + 1)
        self.entering: list[list[tuple[int, int, int]]] = [[] for _ in places]
        self.leaving: list[list[tuple[int, int, int]]] = [[] for _ in places]
        made = [(0, 0)] * graph.num_layers
        returned = [(0, 0)] * graph.num_layers
        for v in graph.values:
            fixed, each = v.nbytes_fixed, v.nbytes_per_sample
            last = v.consumers[-1] if v.consumers else v.producer
            for place in range(v.producer + 1, last + 1):
                reader = v.consumers[bisect_left(v.consumers, place)]
                self.entering[place].append((reader, fixed, each))
                self.leaving[place].append((v.producer, fixed, each))
            if v.producer >= 0:
                made[v.producer] = _plus(made[v.producer], (fixed, each))
                # One that is read later too counts with those that cross; see `outputs`.
                if v.is_output:
                    returned[v.producer] = _plus(returned[v.producer], (fixed, each))
                    for place in range(v.producer + 1, last + 1):
                        self.leaving[place].pop()
        self._made = [sums([pair[i] for pair in made]) for i in (0, 1)]
        self._returned = [sums([pair[i] for pair in returned]) for i in (0, 1)]

    def weights(self, first: int, last: int) -> int:
        """Bytes of weights, shared parameters included."""
        own = self._weights[last] - self._weights[first]
        return own + sum(n for layers, n, _ in self._shared if _uses(layers, first, last))

    def gradients(self, first: int, last: int) -> int:
        """Bytes of gradients, those of shared parameters included."""
        own = self._gradients[last] - self._gradients[first]
        return own + sum(n for layers, _, n in self._shared if _uses(layers, first, last))

    def uses_shared(self, first: int, last: int) -> bool:
        """Whether a layer of the range uses a shared parameter."""
        return any(_uses(layers, first, last) for layers, _, _ in self._shared)

    def inputs(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of the values that enter the range: fixed, and per sample."""
        fixed = each = 0
        for reader, a, b in self.entering[first]:
            if reader < last:
                fixed, each = fixed + a, each + b
        return fixed, each

    def outputs(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of the values that are made in the range and leave it: fixed, and per sample."""
        fixed = self._returned[0][last] - self._returned[0][first]
        each = self._returned[1][last] - self._returned[1][first]
        for producer, a, b in self.leaving[last]:
            if producer >= first:
                fixed, each = fixed + a, each + b
        return fixed, each

    def made(self, first: int, last: int) -> tuple[int, int]:
        """Bytes of all values that are made in the range: fixed, and per sample."""
        fixed, each = self._made
        return fixed[last] - fixed[first], each[last] - each[first]

    def returned(self, place: int) -> tuple[int, int]:
        """Bytes of the values made before a place that the model returns: fixed, per sample."""
        return self._returned[0][place], self._returned[1][place]

    def crossing(self, place: int) -> tuple[int, int]:
        """Bytes of the values that cross a place between layers: fixed, and per sample."""
        values = self.entering[place]
        return sum(v[1] for v in values), sum(v[2] for v in values)


class SizedCosts:
    """Costs of all layers at one microbatch size, summed up from the first layer on.

    Attributes:
        forward_s, backward_s, saved: sums over the layers before each place; ``backward_s``
            without the recompute of the forward.
        kept: likewise the bytes that a graph counts as saved for a backward, values not included.
        products_s, products: likewise the seconds that a recompute saves which is given the
            results of its products, and their bytes.
        forward, backward: per layer the bytes beyond what its pack keeps anyway; the values
            that cross the layer count in full.
        crossing: bytes of the values that cross each place.
    """

    def __init__(self, ranges: Ranges, costs: CostTable, num_samples: int) -> None:
        graph = ranges.graph
        self.num_samples = num_samples
        table = [costs.layer(i, num_samples) for i in range(graph.num_layers)]
        self.forward_s = sums([c.forward_s for c in table])
        self.backward_s = sums([c.backward_s for c in table])
        self.saved = sums([c.saved_nbytes for c in table])
        self.kept = sums([num_samples * x.saved_nbytes_per_sample for x in graph.layers])
        self.products_s = sums([c.products_s for c in table])
        self.products = sums([num_samples * x.products_nbytes_per_sample for x in graph.layers])
        places = range(graph.num_layers + 1)
        self.crossing = [self.nbytes(ranges.crossing(place)) for place in places]
        self.forward = [
            c.forward_nbytes + self.crossing[i] + self.crossing[i + 1] for i, c in enumerate(table)
        ]
        self.backward = [
            max(c.forward_nbytes, c.backward_nbytes + self.crossing[i + 1])
            for i, c in enumerate(table)
        ]

    def nbytes(self, pair: tuple[int, int]) -> int:
        """Bytes of values given as fixed bytes and bytes per sample."""
        return pair[0] + pair[1] * self.num_samples


def sums(items: Sequence[Number]) -> list[Number]:
    """Sums of the items before each place, and of all."""
    return list(accumulate(items, initial=type(items[0])(0) if items else 0))


def slot_nbytes(ranges: Ranges, first: int, last: int) -> tuple[int, int]:
    """Bytes of a slot for the range's weights, and of one for its gradients."""
    return aligned(ranges.weights(first, last)), aligned(ranges.gradients(first, last))


def _plus(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _uses(layers: Sequence[int], first: int, last: int) -> bool:
    at = bisect_left(layers, first)
    return at < len(layers) and layers[at] < last
