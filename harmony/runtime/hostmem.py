"""Host memory: exact-size pinned buffers, the parameter arena, the stash of values.

All parameters live in one arena in layer order, so that any pack is one contiguous range and
moves as one copy. Buffers are anonymous maps that are pinned in place: torch's own pinned
allocator rounds each block up to a power of two, which can double the memory of the host.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from harmony.capture.params import ParamInfo
from harmony.errors import DoesNotFitError, HarmonyError
from harmony.planner.tasks import Samples
from harmony.runtime import native
from harmony.runtime.hostlimits import available_host_nbytes
from harmony.units import aligned, format_bytes

Views = Mapping[str, torch.Tensor]
"""Memory by the name of the tensor that lives there."""


class HostBuffer:
    """Bytes of host memory, page-aligned, pinned where the device allows it.

    Attributes:
        tensor: the bytes, as a 1-d uint8 tensor.
        pinned: whether copies from and to it run asynchronously.
    """

    def __init__(self, nbytes: int, device: torch.device | None, purpose: str) -> None:
        """Take ``nbytes`` of host memory for ``purpose``, pinned for ``device`` if given.

        Raises:
            DoesNotFitError: if the host has not that much memory left.
        """
        size = max(nbytes, 1)
        free = available_host_nbytes()
        if size > free:
            raise DoesNotFitError(
                f"{purpose} needs {format_bytes(size)} of host memory, but only "
                f"{format_bytes(free)} are free (psutil, cgroup limit included). Close other "
                "programs, raise the container's memory limit, or use a smaller model or minibatch"
            )
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self.pinned = False
        if device is not None:
            reason = native.pin_range(device, self.tensor.data_ptr(), size)
            self.pinned = reason is None
            if reason is None:
                address = self.tensor.data_ptr()
                weakref.finalize(self.tensor, native.unpin_range, device, address)
            else:
                warnings.warn(
                    f"{purpose} ({format_bytes(size)}) could not be pinned: {reason}. Copies to "
                    "the GPU will block and run at about half the speed of the link",
                    stacklevel=3,
                )

    def view(self, offset: int, place: Place) -> torch.Tensor:
        """Return the tensor that lies at ``offset`` with the form of ``place``."""
        return view_bytes(self.tensor, offset, place)


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


@dataclass
class Region:
    """A contiguous range of an arena: one layer, or one shared parameter."""

    low: int
    high: int
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the range."""
        return self.high - self.low


class ArenaLayout:
    """Where everything lies in one arena: layers in order, then shared parameters, then the rest.

    Attributes:
        layers: region of each layer.
        shared: region of each shared parameter.
        rest: region of what no layer uses.
        places: of all of these, by name.
        nbytes: bytes of the arena.
    """

    def __init__(
        self, tensors: Iterable[ParamInfo], num_layers: int, num_shared: int
    ) -> None:
        by_layer: dict[int, list[ParamInfo]] = {}
        by_shared: dict[int, list[ParamInfo]] = {}
        rest: list[ParamInfo] = []
        for tensor in tensors:
            if tensor.shared_id is not None:
                by_shared.setdefault(tensor.shared_id, []).append(tensor)
            elif tensor.layer is not None:
                by_layer.setdefault(tensor.layer, []).append(tensor)
            else:
                rest.append(tensor)
        self.nbytes = 0
        self.layers = [self._region(by_layer.get(i, ())) for i in range(num_layers)]
        self.shared = [self._region(by_shared.get(i, ())) for i in range(num_shared)]
        self.rest = self._region(rest)
        self.places = {
            name: place
            for region in (*self.layers, *self.shared, self.rest)
            for name, place in region.places.items()
        }

    def _region(self, tensors: Iterable[ParamInfo]) -> Region:
        region = Region(self.nbytes, self.nbytes)
        for tensor in tensors:
            place = Place(region.high, tuple(tensor.shape), tuple(tensor.stride), tensor.dtype)
            region.places[tensor.name] = place
            region.high += aligned(place.nbytes)
        self.nbytes = region.high
        return region

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Byte range of layers ``first`` to ``last - 1``."""
        return self.layers[first].low, self.layers[last - 1].high

    def in_slot(
        self, first: int, last: int, shared: Iterable[int]
    ) -> dict[str, tuple[int, Place]]:
        """Offsets within a slot of everything a pack keeps there: its layers, then shared ones."""
        low, high = self.span(first, last)
        found = {
            name: (place.offset - low, place)
            for region in self.layers[first:last]
            for name, place in region.places.items()
        }
        base = aligned(high - low)
        for index in shared:
            region = self.shared[index]
            for name, place in region.places.items():
                found[name] = (base + place.offset - region.low, place)
            base += aligned(region.nbytes)
        return found

    def shared_offset(self, first: int, last: int, shared: Iterable[int], index: int) -> int:
        """Offset within a slot of one of the shared parameters of a pack."""
        low, high = self.span(first, last)
        base = aligned(high - low)
        for other in shared:
            if other == index:
                break
            base += aligned(self.shared[other].nbytes)
        return base


class HostArena:
    """All tensors of one kind (weights, or gradients) in one pinned buffer.

    Attributes:
        tensors: of the module, those that live here, by name.
    """

    def __init__(self, layout: ArenaLayout, device: torch.device | None, purpose: str) -> None:
        self.layout = layout
        self.buffer = HostBuffer(layout.nbytes, device, purpose)
        self.views = {
            name: self.buffer.view(place.offset, place) for name, place in layout.places.items()
        }
        self.tensors: dict[str, torch.Tensor] = {}

    def adopt(
        self, module: nn.Module, materialise: Callable[[nn.Module, Views], object] | None = None
    ) -> dict[str, nn.Parameter]:
        """Move the values of a module's parameters and buffers into the arena, one at a time.

        The `nn.Parameter` objects stay the same; only their memory is another.

        Args:
            materialise: gives the parameters on the meta device their places here, and values.
        """
        if materialise is not None:
            materialise(module, self.views)
        params = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
        with torch.no_grad():
            for name, view in self.views.items():
                tensor = params.get(name, buffers.get(name))
                if tensor is None:
                    raise KeyError(f"{name} is neither a parameter nor a buffer of the module")
                if tensor.data_ptr() != view.data_ptr():
                    view.copy_(tensor)
                    tensor.data = view
                self.tensors[name] = tensor
        return params

    def take_back(self) -> None:
        """Move what was given other memory (``param.data = values``) into the arena again.

        Raises:
            HarmonyError: if that has another shape or dtype.
        """
        for name, tensor in self.tensors.items():
            view = self.views[name]
            if tensor.data_ptr() == view.data_ptr() and tensor.shape == view.shape:
                continue
            if tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise HarmonyError(
                    f"{name} was given data of shape {tuple(tensor.shape)} and {tensor.dtype}; it"
                    f" has {tuple(view.shape)} and {view.dtype}. Give it values of that shape, or"
                    " make a new Harmony model"
                )
            with torch.no_grad():
                values = tensor.detach()
                tensor.data = view
                tensor.copy_(values)  # counts as a change


@dataclass(frozen=True)
class Piece:
    """Some bytes of an arena that are wanted together with others.

    Attributes:
        offset: where they belong, counted from the start of what is wanted.
        data: they themselves, on the host.
    """

    offset: int
    data: torch.Tensor


class ArenaView:
    """An arena as one capture of the model sees it, whose layers may be others than its own.

    The arena is laid out for the first capture: there a pack is one piece. Another capture may
    have other layers, or the same in another order (another path through the model); then a pack
    is as many pieces as it takes.
    """

    def __init__(self, arena: HostArena, layout: ArenaLayout) -> None:
        """See ``arena`` as ``layout``, which has the same tensors."""
        self.arena = arena
        self.layout = layout
        self.views = arena.views

    def layers(self, first: int, last: int) -> list[Piece]:
        """Bytes of a pack."""
        return self._pieces(self.layout.layers[first:last])

    def shared(self, index: int) -> list[Piece]:
        """Bytes of a shared parameter."""
        return self._pieces(self.layout.shared[index : index + 1])

    def _pieces(self, regions: Sequence[Region]) -> list[Piece]:
        base = regions[0].low if regions else 0
        ranges: list[tuple[int, int, int]] = []  # offset, low and high in the arena
        for region in regions:
            for name, place in region.places.items():
                low, nbytes = self.arena.layout.places[name].offset, aligned(place.nbytes)
                offset = place.offset - base
                before = ranges[-1] if ranges else (-1, -1, -1)
                if before[0] + before[2] - before[1] == offset and before[2] == low:
                    ranges[-1] = (before[0], before[1], low + nbytes)
                elif nbytes:
                    ranges.append((offset, low, low + nbytes))
        memory = self.arena.buffer.tensor
        return [Piece(offset, memory[low:high]) for offset, low, high in ranges]


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

    def reserve(self, chunks: Mapping[Samples, Place], batch_dim: int | None, name: str) -> None:
        """Make room for these microbatches in one pinned buffer."""
        total = sum(aligned(place.nbytes) for place in chunks.values())
        buffer = HostBuffer(total, self._device, f"the host copy of {name}")
        self._buffers.append(buffer)
        offset = 0
        for samples, place in chunks.items():
            self._chunks[samples] = buffer.view(offset, place)
            self._dims[samples] = batch_dim
            offset += aligned(place.nbytes)

    def fill(self, whole: torch.Tensor, batch_dim: int | None) -> None:
        """Copy a tensor of the whole minibatch into the microbatches' chunks."""
        for (low, high), chunk in self._chunks.items():
            part = whole if batch_dim is None else whole.narrow(batch_dim, low, high - low)
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
