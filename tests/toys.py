"""Toy models for the planner's tests: `LayerGraph`s of known sizes, and their costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from harmony.core.layergraph import MODEL_INPUT, Layer, LayerGraph, SharedParam, Value
from harmony.core.machine import Device, Host, Machine
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.predict.cost import CostTable, LayerCost

MIB = 2**20


def chain(
    num_layers: int = 8,
    weight: int = 64 * 1024,
    per_sample: int = 1024,
    *,
    tied: bool = False,
    frozen: tuple[int, ...] = (),
    skips: tuple[tuple[int, int], ...] = (),
    random_layer: int | None = None,
    input_gradient: bool = False,
) -> LayerGraph:
    """A chain whose value ``l`` is the input of layer ``l``; the last layer makes the loss.

    Args:
        tied: whether the first and the last layer share a parameter.
        frozen: layers without gradients.
        skips: pairs ``(producer, consumer)``: the consumer also reads the producer's output.
        random_layer: a layer that draws random numbers.
        input_gradient: whether the input of the model requires a gradient.
    """
    consumers: list[set[int]] = [{v} if v < num_layers else set() for v in range(num_layers + 1)]
    for producer, consumer in skips:
        consumers[producer + 1].add(consumer)
    grad = [input_gradient] + [False] * num_layers
    for layer in range(num_layers):
        grad[layer + 1] = layer not in frozen or any(
            grad[v] for v in range(num_layers) if layer in consumers[v]
        )
    values = tuple(
        Value(
            v,
            f"x{v}",
            v - 1 if v else MODEL_INPUT,
            tuple(sorted(consumers[v])),
            4 if v == num_layers else per_sample,
            requires_grad=grad[v],
            is_output=v == num_layers,
        )
        for v in range(num_layers + 1)
    )
    layers = tuple(
        Layer(
            index,
            f"layer{index}",
            "block",
            (f"w{index}",),
            weight,
            0 if index in frozen else weight,
            2 * weight,
            shared=(0,) if tied and index in (0, num_layers - 1) else (),
            inputs=tuple(v for v in range(num_layers) if index in consumers[v]),
            outputs=(index + 1,),
            uses_rng=index == random_layer,
        )
        for index in range(num_layers)
    )
    tied_params = (SharedParam(0, "tied", (0, num_layers - 1), 4096, 4096, 8192),) if tied else ()
    return LayerGraph(layers, values, tied_params, loss=num_layers)


def uniform_costs(graph: LayerGraph, forward_s: float = 1e-3) -> CostTable:
    """Every layer costs the same per sample."""
    cost = LayerCost(forward_s, 2 * forward_s, forward_s / 2, 512, 2048, 1024)
    return CostTable(tuple({1: cost} for _ in graph.layers))


def server(num_devices: int, memory: int = 64 * MIB, rate: float = 1e9) -> Machine:
    """Equal devices on equal links."""
    device = Device("toy", memory, rate, rate, rate, task_overhead_s=1e-5)
    return Machine((device,) * num_devices, Host(16 * 2**30))


def with_products(graph: LayerGraph, nbytes: int = 300) -> LayerGraph:
    """The model with so many bytes a sample of results of products in each layer."""
    layers = tuple(replace(layer, products_nbytes_per_sample=nbytes) for layer in graph.layers)
    return replace(graph, layers=layers)


def packs(*ends: int) -> tuple[Pack, ...]:
    """Packs that end at the given layers: ``packs(2, 4)`` is ``[0:2] [2:4]``."""
    return tuple(Pack(a, b) for a, b in zip((0, *ends), ends, strict=False))


def halves(minibatch: int, replicas: int) -> tuple[tuple[int, int], ...]:
    """Shares of a minibatch, as equal as can be."""
    cuts = [minibatch * r // replicas for r in range(replicas + 1)]
    return tuple(pairwise(cuts))


def step(
    minibatch: int = 8,
    size: int = 2,
    forward: tuple[Pack, ...] = packs(2, 4, 6),
    backward: tuple[Pack, ...] = packs(2, 4, 6, 8),
    *,
    backward_size: int | None = None,
    replicas: int = 1,
    phase: Phase = Phase.TRAIN,
) -> StepSpec:
    """A four-tuple with defaults for ``chain()``."""
    shares = halves(minibatch, replicas)
    return StepSpec(minibatch, size, backward_size or size, forward, backward, shares, phase)
