"""The checker's own rule of what a step finds on the host, and what it leaves there.

It goes by the model and the phase, and shares no code with the planner's rule
(`harmony.planner.ir.task_graph.kept_values`). Tests compare the two.
"""

from __future__ import annotations

from harmony.core.layergraph import MODEL_INPUT, LayerGraph
from harmony.planner.ir.tasks import Phase, StepSpec, TensorKind

Brought = tuple[TensorKind, int]


def left_behind(graph: LayerGraph, spec: StepSpec) -> frozenset[int]:
    """Ids of the values that must be on the host when a step of a phase has ended.

    What the model returns, wherever it runs forward. Where a BACKWARD comes in a step of its own,
    also what that will read there: the inputs of every pack that it will run.
    """
    if spec.phase is Phase.BACKWARD:
        return frozenset()
    left = {v.id for v in graph.values if v.is_output}
    if spec.phase is Phase.FORWARD:
        left |= read_by_backward(graph, spec)
    return frozenset(v for v in left if graph.values[v].producer != MODEL_INPUT)


def read_by_backward(graph: LayerGraph, spec: StepSpec) -> frozenset[int]:
    """Ids of the values that the BACKWARDs of a step of their own read.

    Gradients come from outside, for every output that has one, and go from pack to pack. A pack
    that none reaches, or that has no use for one, runs nothing.
    """
    arrived = {v.id for v in graph.values if v.is_output and v.requires_grad}
    read: set[int] = set()
    for pack in sorted(spec.backward_packs, reverse=True):
        layers = [graph.layers[i] for i in pack]
        made = {v for layer in layers for v in layer.outputs}
        entering = {v for layer in layers for v in layer.inputs} - made
        if made.isdisjoint(arrived):
            continue
        onward = {v for v in entering if graph.values[v].requires_grad}
        trains = any(layer.gradient_nbytes for layer in layers)
        trains = trains or any(
            graph.shared[k].gradient_nbytes for layer in layers for k in layer.shared
        )
        if trains or onward:
            read |= entering
            arrived |= onward
    return frozenset(read)


def brought(graph: LayerGraph, phase: Phase, spec: StepSpec | None) -> frozenset[Brought]:
    """Kinds and ids of the values and gradients that are on the host when a step begins.

    Inputs of the model; where a BACKWARD runs in a step of its own also what its FORWARD left
    there for it (without a four-tuple: any value), and the gradients of the outputs. What its
    FORWARD saved is there too, unless the schedule says that it is on a device.
    """
    there = {(TensorKind.VALUE, v) for v in graph.input_ids}
    if phase is Phase.BACKWARD:
        left = range(len(graph.values)) if spec is None else read_by_backward(graph, spec)
        there |= {(TensorKind.VALUE, v) for v in left}
        there |= {(TensorKind.VALUE_GRADIENT, v) for v in graph.output_ids}
    if phase is Phase.BACKWARD and spec is not None:
        there |= {(TensorKind.SAVED, pack.first) for pack in spec.saved}
        there |= {(TensorKind.PRODUCTS, pack.first) for pack in spec.products}
    return frozenset(there)
