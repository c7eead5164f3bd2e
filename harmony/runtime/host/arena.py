"""The arena: host memory in which all parameters live, or all gradients.

They lie there in layer order, so that any pack is one contiguous range and moves as one copy.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from harmony.capture.graph.params import dense_stride
from harmony.core.units import aligned, listed
from harmony.core.warn import warn
from harmony.errors import HarmonyError
from harmony.runtime.host.arena_layout import ArenaLayout, Region
from harmony.runtime.host.limits import give_back_freed
from harmony.runtime.host.memory_holders import overlapping, shares_memory
from harmony.runtime.host.pinned_memory import HostBuffer, Place, tensor_on

Views = Mapping[str, torch.Tensor]
"""Memory by the name of the tensor that lives there."""


class HostArena:
    """All tensors of one kind (weights, or gradients), in one pinned buffer.

    What comes later (a layer that is replaced, a parameter that is unfrozen) gets a buffer more.
    To everybody outside each tensor looks as any other does: it has a storage of its own.

    Attributes:
        views: the memory of each tensor, by name.
        tensors: of the module, those that live here, by name.
        num_moves: how often each was found elsewhere, and its value was copied here.
    """

    def __init__(self, layout: ArenaLayout, device: torch.device | None, purpose: str) -> None:
        """Make room for all tensors of a layout, pinned for ``device`` if given."""
        self.views: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.num_moves: Counter[str] = Counter()
        self._device = device
        self._purpose = purpose
        self._homes: dict[str, tuple[HostBuffer, Place]] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._guests: set[str] = set()
        self._bytes: dict[str, weakref.ref[Any]] = {}
        self._has_warned = False
        self.extend(layout)

    @property
    def buffers(self) -> list[HostBuffer]:
        """The memory, each piece once."""
        return list({id(buffer): buffer for buffer, _ in self._homes.values()}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(buffer.tensor.numel() for buffer in self.buffers)

    def extend(self, layout: ArenaLayout) -> None:
        """Make room for those tensors of a layout that have none here, or are of another form.

        Raises:
            DoesNotFitError: if the host does not have that much memory left.
        """
        missing = {
            name
            for name, place in layout.places.items()
            if name not in self._homes
            or not _same_form(self._homes[name][1], place)
            or self._is_given_away(name)
        }
        if not missing and self._homes:
            return
        layout = layout.only(missing)
        buffer = HostBuffer(layout.nbytes, self._device, self._purpose)
        for name, place in layout.places.items():
            self._homes[name] = buffer, place
            self.views[name] = buffer.view(place.offset, place)
            self._own.pop(name, None)
            self._guests.discard(name)
            self._bytes.pop(name, None)

    def keep(self, names: Container[str]) -> None:
        """Let go of all tensors but these, and of the memory that has none any more."""
        for name in [name for name in self._homes if name not in names]:
            del self._homes[name], self.views[name]
            self.tensors.pop(name, None)
            self._own.pop(name, None)
            self._guests.discard(name)
            self._bytes.pop(name, None)

    def home(self, name: str) -> tuple[HostBuffer, Place]:
        """The memory that a tensor is in, and where it is there."""
        return self._homes[name]

    def covers(self, address: int) -> bool:
        """Whether an address is of memory here."""
        starts = ((buffer.tensor.data_ptr(), buffer.tensor.numel()) for buffer in self.buffers)
        return any(low <= address < low + nbytes for low, nbytes in starts)

    def copies(self, names: Iterable[str]) -> dict[int, torch.Tensor]:
        """Of these tensors, what is computed with in another type, by the tensor's identity."""
        return {}

    def refresh(
        self, names: Iterable[str] | None = None, copied: Container[int] = frozenset()
    ) -> None:
        """Let what is computed with have the values that these tensors, or all, have now.

        Args:
            copied: the tensors, by identity, whose `copies` have them already.
        """

    def own(self, name: str) -> torch.Tensor:
        """Return what everybody outside may have: a tensor of the same memory, alone in it."""
        buffer, place = self._homes[name]
        tensor = self._own.get(name)
        if tensor is None or not self._is_home(name, tensor):
            tensor = self._own[name] = tensor_on(buffer.bytes_of(place), place)
        return tensor

    def part(self) -> None:
        """Give everybody who still holds what `own` returned a copy of it."""
        for name in self._own:
            if shares_memory(self._own[name]):
                self.warn_of_view(name)
            if sys.getrefcount(self._own[name]) > _KEPT:
                self._own[name].data = self._own[name].clone()

    def warn_of_view(self, name: str) -> None:
        """Say once that somebody has a view of a gradient, which cannot be moved."""
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"a view of the gradient of {name} from an earlier backward is still there, and "
                "this backward overwrites what it shows: gradients have one place on the host. "
                "Keep param.grad itself, or clone() the view",
            )

    def adopt(
        self,
        module: nn.Module,
        materialise: Callable[[nn.Module, Views], object] | None = None,
        *,
        traced_real: bool = False,
    ) -> dict[str, nn.Parameter]:
        """Move the values of a module's parameters and buffers into the arena, one at a time.

        The `nn.Parameter` objects stay the same; only their memory is another.

        Args:
            materialise: gives the parameters on the meta device their places here, and values.
            traced_real: whether a recording with the real parameters holds their memory as well.
        """
        if materialise is not None:
            empty = {n: p for n, p in module.named_parameters() if p.is_meta}
            materialise(module, {name: self._new(name) for name in empty})
        self.take_in(tensors_of(module), traced_real=traced_real)
        return dict(module.named_parameters())

    def holds(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the very tensors that live here, all in their places."""
        held = self.tensors
        if tensors.keys() != held.keys():
            return False
        for name, tensor in tensors.items():
            if tensor is not held[name] or not self._is_home(name, tensor):
                return False
        return True

    def difference(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Say how these are not the tensors that live here; None if they are.

        Buffers may be other objects, and all may have been given other memory, as long as the
        form is the same. Where there is a difference, memory here that somebody still has, who
        may put it back (a module that changed places with another), is theirs from now on.
        """
        found = self._difference(tensors)
        if found is not None:
            self.tensors.update({n: t for n, t in tensors.items() if n in self.tensors})
        return found

    def _difference(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        if tensors.keys() != self.tensors.keys():
            name = min(tensors.keys() ^ self.tensors.keys())
            return f"{name} was {'added' if name in tensors else 'deleted'}"
        for name, tensor in tensors.items():
            if tensor is not self.tensors[name] and isinstance(tensor, nn.Parameter):
                return f"{name} was assigned anew"
            if self._is_home(name, tensor):
                continue
            place = self._arena_of(name)._homes[name][1]
            if not _has_form(tensor, place):
                return (
                    f"{name} was given data of shape {tuple(tensor.shape)} and {tensor.dtype}; it "
                    f"had {place.shape} and {place.dtype}"
                )
            self.tensors[name] = tensor  # a buffer that was assigned anew: the old one is let go
            if self._is_given_away(name):
                return f"the memory of {name} was given to another tensor (see .data)"
        return None

    def _is_given_away(self, name: str) -> bool:
        """Whether something else has the memory that a tensor had here, as after an exchange.

        ``p.data, e.data = e.data, p.data`` does that, and ``kept = p.data; p.data = values``: what
        is kept there must not be overwritten.
        """
        memory, tensor = self._bytes.get(name), self.tensors.get(name)
        if memory is None or tensor is None or self._is_home(name, tensor):
            return False
        return memory() is not None

    def take_in(self, tensors: Mapping[str, torch.Tensor], *, traced_real: bool = False) -> None:
        """Move what is elsewhere (``param.data = values``, an assigned buffer) into the arena.

        A buffer that shares its memory with other tensors, or an array, stays where it is: who
        changes those changes it. Its values are copied whenever they are others.

        Raises:
            HarmonyError: for a tensor on another device, and for two in the same memory.
        """
        elsewhere = {n: t for n, t in tensors.items() if not self._is_home(n, t)}
        if not elsewhere:
            self.tensors.update(tensors)
            return
        self._check_apart(tensors, elsewhere)
        shared: list[str] = []
        left: dict[str, Any] = {}
        for name, tensor in elsewhere.items():
            with torch.no_grad():
                if not isinstance(tensor, nn.Parameter) and self._is_guest(tensor):
                    self._copy_guest(name, tensor)
                    continue
                if tensor.is_shared():  # type: ignore[no-untyped-call]
                    shared.append(name)
                elif not self.num_moves[name]:
                    left[name] = _weakly(tensor)
                self._move(name, tensor)
        self.tensors.update(tensors)
        _warn_of_processes(shared)
        if not traced_real:
            _warn_of_holders(left)
        if left:
            give_back_freed()

    def _check_apart(
        self, tensors: Mapping[str, torch.Tensor], elsewhere: Mapping[str, torch.Tensor]
    ) -> None:
        """Check that each tensor can have a place of its own here.

        Raises:
            HarmonyError: naming a tensor on another device, or two in the same memory.
        """
        for name, tensor in elsewhere.items():
            if tensor.device.type != "cpu":
                raise HarmonyError(
                    f"{name} is on {tensor.device}, and parameters and buffers of a Harmony model "
                    "stay on the host: leave .to() and .cuda() out, or move it back (.cpu())"
                )
        if any(
            isinstance(t, nn.Parameter) or self.covers(t.data_ptr()) for t in elsewhere.values()
        ):
            both = overlapping(tensors)
            if both is not None:
                one, other = both
                raise HarmonyError(
                    f"{one} and {other} are two tensors in the same memory (as after a.data = "
                    "b.data), so that training one changes the other; Harmony has a place for "
                    "each. Make them one parameter (a.weight = b.weight), or give one a clone()"
                )

    def _move(self, name: str, tensor: torch.Tensor) -> None:
        tensor.data = self._new(name).copy_(tensor)  # the version stays: others may have saved it
        self.num_moves[name] += 1

    def _is_guest(self, tensor: torch.Tensor) -> bool:
        """Whether others may have the memory of a buffer: tensors, or whoever made it (NumPy)."""
        made_here = tensor.untyped_storage().resizable() or self.covers(tensor.data_ptr())
        return not made_here or shares_memory(tensor)

    def _copy_guest(self, name: str, tensor: torch.Tensor) -> None:
        view = self.views[name]  # no counter tells of what an array writes
        if name not in self._guests or not torch.equal(_bytes_of(view), _bytes_of(tensor)):
            view.copy_(tensor)
            self._guests.add(name)
            self.num_moves[name] += 1

    def _arena_of(self, name: str) -> HostArena:
        """Where the module's own tensor of this name lies."""
        return self

    def _new(self, name: str) -> torch.Tensor:
        buffer, place = self._arena_of(name)._homes[name]
        memory = buffer.bytes_of(place)
        self._bytes[name] = weakref.ref(memory)
        return tensor_on(memory, place)

    def _is_home(self, name: str, tensor: torch.Tensor) -> bool:
        arena = self._arena_of(name)
        place, view = arena._homes[name][1], arena.views[name]
        return (
            tensor.data_ptr() == view.data_ptr()
            and tensor.shape == place.shape
            and tensor.dtype == place.dtype
            and tensor.stride() == place.stride
        )


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _weakly(tensor: torch.Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _warn_of_processes(shared: Sequence[str]) -> None:
    if shared:
        warn(
            f"Harmony trains in memory of its own what lay in memory that processes share "
            f"(share_memory()): {listed(shared, 1)}. Other processes do not see the new values: "
            "send them model.state_dict()",
        )


def _warn_of_holders(left: Mapping[str, Any]) -> None:
    """Warn if something else holds memory that was left."""
    if all(storage.expired() for storage in left.values()):
        return
    gc.collect()  # who has it may be garbage
    held = [name for name, storage in left.items() if not storage.expired()]
    if held:
        warn(
            f"something else holds the memory that {listed(held, 1)} had "
            "before Harmony moved them to memory of its own: .data, .detach(), an array or a "
            "state_dict() from before the first batch. It shows the values of then, and what "
            "is written there changes no parameter. Take it anew after the first batch"
        )


Modules = Sequence[tuple[str, nn.Module]]
"""The modules of a model by their names, as `nn.Module.named_modules` has them."""


def tensors_in(modules: Modules) -> dict[str, torch.Tensor]:
    """Return what `tensors_of` does, of modules that are known: another walk takes its time."""
    found: dict[str, torch.Tensor] = {}
    for members in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, module in modules:
            for name, tensor in getattr(module, members).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module by their canonical names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


_kept = {0: torch.zeros(1)}
_KEPT = sys.getrefcount(_kept[0])
"""References to a tensor that only a dictionary has."""


def _same_form(one: Place, two: Place) -> bool:
    return (one.shape, one.stride, one.dtype) == (two.shape, two.stride, two.dtype)


def _has_form(tensor: torch.Tensor, place: Place) -> bool:
    if tensor.shape != place.shape or tensor.dtype != place.dtype:
        return False
    stride = dense_stride(tensor.shape, tensor.stride())
    pairs = zip(tensor.shape, stride, place.stride, strict=True)
    return all(size <= 1 or one == two for size, one, two in pairs)


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
        ranges: list[tuple[HostBuffer, int, int, int]] = []  # offset, low and high in the buffer
        for region in regions:
            for name, place in region.places.items():
                buffer, home = self.arena.home(name)
                low, nbytes, offset = home.offset, aligned(home.nbytes), place.offset - base
                if ranges and _goes_on(ranges[-1], (buffer, offset, low)):
                    ranges[-1] = (*ranges[-1][:3], low + nbytes)
                elif nbytes:
                    ranges.append((buffer, offset, low, low + nbytes))
        return [Piece(offset, buffer.tensor[low:high]) for buffer, offset, low, high in ranges]


def _goes_on(before: tuple[HostBuffer, int, int, int], then: tuple[HostBuffer, int, int]) -> bool:
    """Whether a range follows another, both where it is wanted and where it is."""
    buffer, offset, low, high = before
    return then == (buffer, offset + high - low, high)
