"""Host memory: exact-size pinned buffers, and the stash of values.

Buffers are anonymous maps that are pinned in place: torch's own pinned allocator rounds each
block up to a power of two, which can double the memory of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harmony.core.units import aligned, format_bytes
from harmony.core.warn import warn
from harmony.errors import DoesNotFitError
from harmony.planner.ir.tasks import Samples
from harmony.runtime import native
from harmony.runtime.exec.rows import rows_of
from harmony.runtime.host.limits import available_host_nbytes

_HUGE_NBYTES = 1 << 21


def _new_map(nbytes: int, purpose: str) -> mmap.mmap:
    """Map new memory, in huge pages where the system has some.

    The first write to it, and pinning it, then takes one fault in 2 MiB instead of one in 4 KiB.

    Raises:
        DoesNotFitError: if the system gives no address space, however much memory is free.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DoesNotFitError(
            f"{purpose} needs {format_bytes(nbytes)} of host memory, which the system refuses "
            f"({error.strerror}). Raise the limit of address space (ulimit -v unlimited), allow "
            "more than is backed (sysctl vm.overcommit_memory=0), or use a smaller model"
        ) from error
    if nbytes >= _HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that was built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of the host with undefined values, in memory of its own.

    A large one is in huge pages, which `torch.empty` does not ask for.
    """
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if tensor.nbytes < 2 * _HUGE_NBYTES:
        return torch.empty(shape, dtype=dtype)
    memory = _new_map(tensor.nbytes, "a tensor of the host")
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


class HostBuffer:
    """Bytes of host memory, page-aligned, pinned where the device allows it.

    Attributes:
        tensor: the bytes, as a 1-d uint8 tensor.
        pinned: whether copies from and to it run asynchronously.
    """

    def __init__(self, nbytes: int, device: torch.device | None, purpose: str) -> None:
        """Take ``nbytes`` of host memory for ``purpose``, pinned for ``device`` if given.

        Raises:
            DoesNotFitError: if the host does not have that much memory left.
        """
        size = max(nbytes, 1)
        free = available_host_nbytes()
        if size > free:
            gc.collect()  # nothing is refused for memory that nobody holds
            free = available_host_nbytes()
        if size > free:
            raise DoesNotFitError(
                f"{purpose} needs {format_bytes(size)} of host memory, but only "
                f"{format_bytes(free)} are free (psutil, cgroup limit included). Close other "
                "programs, raise the container's memory limit, or use a smaller model or minibatch"
            )
        self._memory = _new_map(size, purpose)
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.pinned = False
        if device is not None:
            reason = native.pin_range(device, self.tensor.data_ptr(), size)
            self.pinned = reason is None
            if reason is None:
                native.withhold_from_children(device, self._memory, withhold=True)
                weakref.finalize(self.tensor, _unpin, device, self.tensor.data_ptr(), self._memory)
            else:
                warn(
                    f"{purpose} ({format_bytes(size)}) could not be pinned: {reason}. Copies to "
                    "the GPU will block and run at about half the speed of the link",
                )

    def view(self, offset: int, place: Place) -> torch.Tensor:
        """Return the tensor that lies at ``offset`` with the form of ``place``."""
        return view_bytes(self.tensor, offset, place)

    def bytes_of(self, place: Place) -> Any:
        """Return the bytes of a tensor as an object that keeps them: it can be referred to weakly.

        They stay valid, though no longer pinned, when the buffer is gone.
        """
        return (ctypes.c_char * place.nbytes).from_buffer(self._memory, place.offset)


def _unpin(device: torch.device, address: int, memory: mmap.mmap) -> None:
    """Make the pages ordinary ones again: tensors of the user may still lie on them."""
    native.unpin_range(device, address)
    native.withhold_from_children(device, memory, withhold=False)


@dataclass(frozen=True)
class Place:
    """Form and place of one tensor.

    Attributes:
        offset: bytes from the start of its arena.
        stride: in elements; the tensor is dense, so it takes ``nbytes`` whatever the order.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def view_bytes(flat: torch.Tensor, offset: int, place: Place) -> torch.Tensor:
    """View a range of a uint8 tensor as a tensor of the form of ``place``."""
    typed = flat[offset : offset + place.nbytes].view(place.dtype)
    return typed.as_strided(place.shape, place.stride)


def tensor_on(memory: Any, place: Place) -> torch.Tensor:
    """Return a tensor whose storage is the bytes of ``HostBuffer.bytes_of(place)`` and no more.

    Whatever saves, copies or shares tensors looks at storages, and takes tensors of one storage
    for views of each other.
    """
    tensor = torch.empty(0, dtype=place.dtype)
    if not place.nbytes:
        return tensor.as_strided(place.shape, place.stride)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return tensor.set_(storage, 0, place.shape, place.stride)


class Stash:
    """Host copies of values and their gradients, one buffer per value, kept from step to step.

    A chunk holds one microbatch. A reader may ask for fewer samples than the writer stored, since
    FORWARD and BACKWARD may use different microbatch sizes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[HostBuffer] = []  # a buffer is unpinned when nobody holds it
        self._chunks: dict[Samples, torch.Tensor] = {}
        self._dims: dict[Samples, int | None] = {}

    def reserve(
        self,
        chunks: Mapping[Samples, Place],
        batch_dim: int | None,
        name: str,
        over: Mapping[Samples, Samples | None],
    ) -> None:
        """Make room for these microbatches in one pinned buffer.

        Args:
            over: of a microbatch, an earlier one whose room it takes; None where it has its own.
        """
        own = (place.nbytes for samples, place in chunks.items() if over.get(samples) is None)
        buffer = HostBuffer(sum(map(aligned, own)), self._device, f"the host copy of {name}")
        self._buffers.append(buffer)
        offset, starts = 0, dict[Samples, int]()
        for samples, place in chunks.items():
            earlier = over.get(samples)
            start = starts[samples] = offset if earlier is None else starts[earlier]
            self._chunks[samples] = buffer.view(start, place)
            self._dims[samples] = batch_dim
            offset += aligned(place.nbytes) if earlier is None else 0

    def fill(
        self, whole: torch.Tensor, batch_dim: int | None, num_samples: int, groups: int = 1
    ) -> None:
        """Copy a tensor of the whole minibatch into the microbatches' chunks.

        Args:
            num_samples: of the minibatch.
            groups: of its rows (see `harmony.runtime.exec.rows`).
        """
        for samples, chunk in self._chunks.items():
            part = whole
            if batch_dim is not None:
                part = rows_of(whole, batch_dim, groups, samples, num_samples)
            chunk.copy_(part)

    def chunks(self) -> list[tuple[Samples, torch.Tensor]]:
        """All microbatches in order."""
        return sorted(self._chunks.items(), key=lambda item: item[0])

    def chunk(self, samples: Samples) -> torch.Tensor:
        """Return the host copy of a microbatch, or the part of a larger one that holds it."""
        exact = self._chunks.get(samples)
        if exact is not None:
            return exact
        low, high = samples
        for (start, end), chunk in self._chunks.items():
            if start <= low and high <= end:
                dim = self._dims[(start, end)]
                return chunk if dim is None else chunk.narrow(dim, low - start, high - low)
        raise KeyError(f"no host copy holds samples {low}:{high}")
