"""Takes a minibatch apart for the devices, and puts what they made of it together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from harmony.core.layergraph import LayerGraph
from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Samples, TensorKind
from harmony.runtime.exec.executor import PreparedSchedule
from harmony.runtime.exec.rows import joined
from harmony.runtime.exec.stage import Values
from harmony.runtime.step.step import Weights


def load_inputs(prepared: PreparedSchedule, graph: LayerGraph, inputs: Values) -> None:
    """Copy a whole minibatch into the pinned copies that the devices read."""
    num_samples = prepared.schedule.minibatch
    for index, stash in prepared.inputs.items():
        stash.fill(inputs[index], graph.values[index].batch_dim, num_samples)


def detached(inputs: Values) -> Values:
    """Return the inputs without their graph."""
    return {value: tensor.detach() for value, tensor in inputs.items()}


def joined_outputs(prepared: PreparedSchedule, graph: LayerGraph, weights: Weights) -> Values:
    """Return the outputs of the whole minibatch, on the host, as new tensors.

    Raises:
        ConfigError: if an output cannot be put together from the microbatches' ones.
    """
    found: Values = {}
    for index, stash in prepared.outputs.items():
        chunks = stash.chunks()
        value = graph.values[index]
        if value.batch_dim is not None:
            parts = [chunk for _, chunk in chunks]
            found[index] = joined(parts, value.batch_dim, value.groups)
        elif _is_mean(chunks[0][1]):
            start = torch.zeros_like(chunks[0][1])
            found[index] = weighted_sum(chunks, index, weights, start)
        elif value.requires_grad and len(chunks) > 1:
            raise ConfigError(
                f"output {value.name} of shape {tuple(chunks[0][1].shape)} has no dimension "
                f"that counts samples, so those of {len(chunks)} microbatches cannot be "
                "joined. Return it per sample, or use one microbatch (microbatch_size="
                f"{prepared.schedule.minibatch})"
            )
        else:  # a mask or a table: the same for every microbatch
            found[index] = chunks[0][1].clone()
    return found


def load_gradients(
    prepared: PreparedSchedule,
    graph: LayerGraph,
    gradients: Mapping[int, torch.Tensor | None],
    weights: Weights,
) -> None:
    """Hand the gradients of the outputs to the microbatches' backward."""
    for index, gradient in gradients.items():
        stash = prepared.values.get((TensorKind.VALUE_GRADIENT, index))
        if stash is None or gradient is None:
            continue
        dim, groups = graph.values[index].batch_dim, graph.values[index].groups
        if dim is not None or not _is_mean(gradient):
            stash.fill(gradient, dim, prepared.schedule.minibatch, groups)
            continue
        for samples, chunk in stash.chunks():
            chunk.copy_(gradient * weights[index, samples])


def weighted_sum(
    chunks: Sequence[tuple[Samples, torch.Tensor]],
    value: int,
    weights: Weights,
    total: torch.Tensor,
) -> torch.Tensor:
    """Sum of a scalar over the microbatches that count, weighted, in their order.

    Args:
        total: what is added to, of the type of the sum, or a narrower one.
    """
    for samples, chunk in chunks:
        if weights[value, samples] != 0.0:
            total = total + chunk * weights[value, samples]
    return total


def _is_mean(output: torch.Tensor) -> bool:
    """Whether an output that does not depend on the batch size is a loss."""
    return output.dim() == 0 and output.is_floating_point()


def to_device_of(call: Any, values: Values) -> Values:
    """Put outputs on the device of the inputs, as plain PyTorch would."""
    first = next((x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor)), None)
    if first is None or first.device.type == "cpu":
        return values
    return {index: tensor.to(first.device) for index, tensor in values.items()}
