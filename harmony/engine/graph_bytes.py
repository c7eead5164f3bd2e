"""Bytes that a layer graph and a table of costs get from what was counted and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from harmony.capture import Footprint
from harmony.core.layergraph import Layer, LayerGraph, SharedParam
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.profiling.update_times import UpdateCost
from harmony.runtime.host.arena_layout import ArenaLayout
from harmony.runtime.host.pinned_memory import Place

Part = TypeVar("Part", Layer, SharedParam)


def with_bytes(costs: CostTable, nbytes: Mapping[int, Sequence[Footprint]]) -> CostTable:
    """Return the costs at all sizes whose bytes are known, also those that could not be timed."""

    def row(index: int) -> dict[int, LayerCost]:
        timed = {size: costs.layer(index, size) for size in nbytes}
        return {
            size: replace(cost, **nbytes[size][index]._asdict()) for size, cost in timed.items()
        }

    return CostTable(tuple(row(index) for index in range(len(costs.by_layer))))


def with_saved_of(graph: LayerGraph, costs: CostTable) -> LayerGraph:
    """Return the graph with the bytes that forwards leave for their backwards, by its costs."""
    layers = tuple(
        replace(
            layer,
            saved_nbytes_per_sample=max(
                -(-cost.saved_nbytes // size) for size, cost in costs.by_layer[layer.index].items()
            ),
            products_nbytes_per_sample=max(
                -(-cost.products_nbytes // size)
                for size, cost in costs.by_layer[layer.index].items()
            ),
        )
        for layer in graph.layers
    )
    return replace(graph, layers=layers)


def with_saved(graph: LayerGraph, nbytes: Mapping[int, Sequence[Footprint]]) -> LayerGraph:
    """Return the graph with the bytes that each layer's forward can leave for its backward.

    Args:
        nbytes: per microbatch size and layer, the bytes of `LayerCost`.
    """
    layers = tuple(
        replace(
            layer,
            saved_nbytes_per_sample=max(
                -(-found[layer.index].saved_nbytes // size) for size, found in nbytes.items()
            ),
            products_nbytes_per_sample=max(
                -(-found[layer.index].products_nbytes // size) for size, found in nbytes.items()
            ),
        )
        for layer in graph.layers
    )
    return replace(graph, layers=layers)


def with_state(
    graph: LayerGraph,
    layout: ArenaLayout,
    update: UpdateCost,
    is_here: Callable[[str], bool] = lambda _: True,
) -> LayerGraph:
    """Return the graph with the bytes of optimizer state, and of its updates, filled in.

    Args:
        layout: of the gradients.
        is_here: whether this process keeps the state of a parameter.
    """

    def nbytes(names: Mapping[str, Place]) -> tuple[int, int]:
        temporary = max((update.temporary_of(place) for place in names.values()), default=0)
        kept = (place for name, place in names.items() if is_here(name))
        return sum(map(update.state_of, kept)), temporary

    def filled(part: Part, names: Mapping[str, Place]) -> Part:
        state, temporary = nbytes(names)
        return replace(part, state_nbytes=state, update_nbytes=temporary)

    layers = tuple(filled(layer, layout.layers[layer.index].places) for layer in graph.layers)
    shared = tuple(filled(param, layout.shared[param.id].places) for param in graph.shared)
    return replace(graph, layers=layers, shared=shared)
