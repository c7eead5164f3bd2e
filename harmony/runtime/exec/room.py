"""One piece of a real GPU's memory for all that lies there from step to step.

PyTorch's allocator takes memory from the driver in segments: of 20 MiB for tensors from 1 MiB to
10 MiB, of their own size for larger ones. Slots, weights that stay and their optimizer's state
are rarely such that segments are full, and what is left in them counts as reserved. Where one
segment is taken for all of them first, the allocator cuts them from it side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from harmony.core.units import aligned
from harmony.planner.ir.schedule import DeviceSpec, Schedule, resident_groups
from harmony.planner.ir.tasks import TaskKind, TensorKind, TensorRef
from harmony.runtime import native
from harmony.runtime.host.host_state import HostState

LARGE_NBYTES = 2**20
"""Tensors of more bytes are cut from large segments (`kSmallSize` of the CUDACachingAllocator)."""

OWN_NBYTES = 10 * 2**20
"""Tensors from so many bytes on get a segment of their own size (`kMinLargeAlloc` there)."""

MOST_LEFT_NBYTES = 32 * 2**20
"""What may be left of a few segments on other streams, and is no reason."""

_BLOCK = 512


def gather(schedule: Schedule, index: int, host: HostState, device: torch.device) -> None:
    """Take a segment for what a device of a schedule keeps, in the current stream's pool.

    Nothing is left allocated: the allocator keeps the segment until somebody empties its cache,
    and the tensors that follow are parts of it. None is taken where much is reserved already that
    an emptied cache did not give back, as something lies in it: it would be reserved twice.
    """
    if native.is_virtual(device):  # its memory is counted by the byte
        return
    spec = schedule.devices[index]
    sizes = list(_lasting(spec, host))
    sizes.append(max(_passing(schedule, index, host), default=0))
    nbytes = sum(_in_blocks(size) for size in sizes if size > LARGE_NBYTES)
    if nbytes and native.cached_nbytes(device) <= max(nbytes // 2, MOST_LEFT_NBYTES):
        native.take_segment(device, max(nbytes, OWN_NBYTES))


def _lasting(spec: DeviceSpec, host: HostState) -> Iterator[int]:
    """Bytes of each tensor that a device keeps: slots, what is resident, optimizer state."""
    for slots in (spec.weight_slots, spec.gradient_slots):
        yield from [slots.nbytes] * slots.count
    for group in resident_groups(spec.resident):
        yield sum(aligned(ref.nbytes(host.graph)) for ref in group if ref.is_parameter)
        yield sum(aligned(ref.nbytes(host.graph)) for ref in group if ref.is_gradient_part)
        for ref in group:
            if ref.kind is TensorKind.STATE:
                yield from _state(ref, host)


def _state(ref: TensorRef, host: HostState) -> Iterator[int]:
    """Bytes of the tensors of optimizer state, of which each is as large as its parameter."""
    for layer in range(ref.first, ref.last):
        places = host.gradients.layout.layers[layer].places.values()
        trained = sum(place.nbytes for place in places)
        nbytes = host.graph.layers[layer].state_nbytes
        for place in places:
            for _ in range(round(nbytes / max(trained, 1))):
                yield place.nbytes


def _passing(schedule: Schedule, index: int, host: HostState) -> Iterator[int]:
    """Bytes of large tensors that the backward or the update of a layer makes at once."""
    for step in schedule.programs[index]:
        kind = None if step.task is None else step.task.kind
        if step.task is None or kind not in (TaskKind.BACKWARD, TaskKind.UPDATE):
            continue
        for layer in step.task.pack:
            places = host.gradients.layout.layers[layer].places.values()
            large = [_in_blocks(place.nbytes) for place in places if place.nbytes > LARGE_NBYTES]
            if kind is TaskKind.BACKWARD:
                yield sum(large)
            elif large:
                yield host.graph.layers[layer].update_nbytes


def _in_blocks(nbytes: int) -> int:
    return (nbytes + _BLOCK - 1) // _BLOCK * _BLOCK
