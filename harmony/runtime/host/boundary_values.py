"""Host copies of the values that a schedule moves to or from the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harmony.core.layergraph import MODEL_INPUT, LayerGraph, Value
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.tasks import Samples, TensorKind, TensorRef
from harmony.runtime.host.pinned_memory import HostBuffer, Place, Stash
from harmony.runtime.step.step import HostValues


def reserve_values(
    schedule: Schedule,
    graph: LayerGraph,
    values: HostValues,
    place_of: Callable[[int, int], Place],
    device: torch.device,
) -> None:
    """Make room on the host for every value that the schedule moves to or from it.

    Args:
        values: what there is already; new ones are added.
        place_of: form of a value for a number of samples.
        device: for which the memory is pinned.
    """
    found: dict[tuple[TensorKind, int], dict[Samples, Samples | None]] = {}
    for program in schedule.programs:
        for step in program:
            ref = step.ref
            if step.op in (Op.SWAP_OUT, Op.SWAP_IN) and ref is not None and _is_value(ref):
                assert ref.samples is not None
                if step.op is Op.SWAP_OUT or _from_caller(graph, ref):
                    over = None if step.over is None else step.over.samples
                    found.setdefault((ref.kind, ref.first), {}).setdefault(ref.samples, over)
    for (kind, index), chunks in found.items():
        if (kind, index) in values:
            continue
        value = graph.values[index]
        places = {s: place_of(index, s[1] - s[0]) for s in sorted(chunks)}
        stash = values[kind, index] = Stash(device)
        stash.reserve(places, value.batch_dim, f"value {value.name}", chunks)


def reserve_saved(
    schedule: Schedule,
    graph: LayerGraph,
    device: torch.device,
    found: dict[TensorRef, HostBuffer],
) -> dict[TensorRef, HostBuffer]:
    """Make room on the host for what forwards save and send there.

    Args:
        found: what there is already; new ones are added.
    """
    for program in schedule.programs:
        for step in program:
            ref = step.ref
            if step.op is Op.SWAP_OUT and ref is not None and ref.is_kept:
                if step.over is not None:
                    found[ref] = found[step.over]
                elif ref not in found or found[ref].tensor.numel() < ref.nbytes(graph):
                    found[ref] = saved_buffer(ref, ref.nbytes(graph), device)
    return found


def saved_buffer(ref: TensorRef, nbytes: int, device: torch.device) -> HostBuffer:
    """Host memory for what one forward saves."""
    return HostBuffer(nbytes, device, f"the host copy of the activations {ref}")


def _is_value(ref: TensorRef) -> bool:
    return ref.is_value and not ref.is_kept


def is_input(value: Value) -> bool:
    """Whether a value comes from outside of the model."""
    return value.producer == MODEL_INPUT


def _from_caller(graph: LayerGraph, ref: TensorRef) -> bool:
    """Whether the caller puts this tensor on the host: an input, or an output's gradient."""
    value = graph.values[ref.first]
    return is_input(value) if ref.kind is TensorKind.VALUE else value.is_output
