"""The bytes that a captured layer allocates, on tensors that stand in for its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from harmony.capture.cost.footprint import (
    Footprint,
    RunLayer,
    bindable,
    measure,
    pretending,
    stand_in,
)
from harmony.capture.replay.replay import GuardError, Values

if TYPE_CHECKING:
    from harmony.capture.replay.captured import Captured

T = TypeVar("T")


def costs_nbytes(captured: Captured, num_samples: int) -> list[Footprint]:
    """Return per layer the bytes of its `LayerCost`.

    Measured on fake tensors, once for each signature: what PyTorch's eager mode allocates, in
    blocks of 512 bytes. Scratch memory inside a kernel is not seen.
    """
    measured: dict[str, Footprint] = {}
    for layer in captured.graph.layers:
        if layer.signature not in measured:
            measured[layer.signature] = footprint_of(captured, layer.index, num_samples)
    return [measured[layer.signature] for layer in captured.graph.layers]


def footprint_of(captured: Captured, layer: int, num_samples: int) -> Footprint:
    """Return what one layer allocates for microbatches of this size."""
    try:
        return _measure(captured, layer, num_samples, captured.trace_for(num_samples).real)
    except GuardError:
        return _estimate(captured, layer, num_samples)
    except Exception:  # fake kernels refuse, or do not tell what real ones do; values are read
        try:
            return _measure(captured, layer, num_samples, real=True)
        except Exception:  # nor does it run on zeros: the user's code may check what it gets
            return _estimate(captured, layer, num_samples)


def _estimate(captured: Captured, layer: int, num_samples: int) -> Footprint:
    """Bytes of a layer that does not run on zeros: its values, as far as the trace has them."""
    values = captured.trace_for(num_samples).values
    made = (number for step in captured.steps_of(layer, num_samples) for number in step.made)
    nbytes = sum(values[number].nbytes for number in made)
    return Footprint(nbytes, nbytes, 2 * nbytes)


def _measure(captured: Captured, layer: int, num_samples: int, real: bool) -> Footprint:
    return on_stand_ins(captured, layer, num_samples, real, measure)


def on_stand_ins(
    captured: Captured,
    layer: int,
    num_samples: int,
    real: bool,
    use: Callable[[RunLayer, Values, dict[str, torch.Tensor], frozenset[int]], T],
) -> T:
    """Return what ``use`` makes of one layer: how to run it, its inputs, its parameters, outputs.

    Args:
        real: with tensors that have memory, for layers that look at values.
    """
    graph, device = captured.graph, captured.trace_for(num_samples).device
    described = graph.layers[layer]
    shell = captured.make_shell(device)
    names = [info.name for info in captured.tensors_of(layer)]
    names += [graph.shared[index].name for index in described.shared]

    def run(env: Values) -> Values:
        wanted = described.outputs
        return captured.run(
            layer, layer + 1, shell, env, num_samples, wanted=wanted, guarded=False
        )

    with pretending(real):
        masters = captured.template.masters
        tensors = {
            name: bindable(shell.placeholder(name), device, real, masters.get(name))
            for name in names
        }
        shell.bind(tensors)
        inputs: Values = {}
        for value in described.inputs:
            shape, _, dtype = captured.value_form(value, num_samples)
            needs_gradient = graph.values[value].requires_grad
            inputs[value] = stand_in(shape, dtype, device, needs_gradient)
        return use(run, inputs, tensors, frozenset(described.outputs))
