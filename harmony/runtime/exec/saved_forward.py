"""What the forward of a pack leaves for its backward where nothing is recomputed.

Autograd hands every tensor that it saves to a hook here. Those that lie in the pack's weight slot
are noted by their place, since the pack may be in another slot when its backward runs; of all
others the memory is held, and may leave for the host and come back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from harmony.core.units import aligned
from harmony.errors import ExecutionError
from harmony.runtime.host.pinned_memory import HostBuffer

Root = torch.Tensor | GradientEdge
"""Where a backward starts: `torch.autograd.backward` takes both."""


@dataclass(frozen=True)
class _InSlot:
    """A saved tensor that is a view of the pack's weights; ``offset`` counts elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _InMemory:
    """A saved tensor that lies in memory number ``index`` of the forward's."""

    index: int
    place: _InSlot


class SavedMemory:
    """The memory of what autograd saves of one forward.

    The graph's hooks hold this and nothing else of the forward: one that held its roots would be a
    cycle through autograd, which Python cannot collect, with device memory in it.

    Attributes:
        weights: the slot that the pack's weights are in while its backward runs.
        sizes: bytes of each piece.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.weights: torch.Tensor | None = None
        self.sizes: list[int] = []
        self._pieces: list[torch.Tensor | None] = []
        self._known: dict[int, int] = {}

    def is_plain(self, tensor: torch.Tensor) -> bool:
        """Whether the bytes of a storage are all there is to a tensor."""
        is_tensor = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        strided = is_tensor and tensor.layout is torch.strided and tensor.device == self.device
        return strided and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)

    def hold(self, tensor: torch.Tensor) -> _InMemory:
        """Keep the memory that a tensor lies in."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if not storage.nbytes():
            key = -1
        if key not in self._known:
            self._known[key] = len(self.sizes)
            whole = torch.empty(0, dtype=torch.uint8, device=self.device)
            whole.set_(storage)
            self._pieces.append(whole)
            self.sizes.append(storage.nbytes())
        return _InMemory(self._known[key], _place_of(tensor))

    def keep_as_is(self, tensor: torch.Tensor) -> None:
        """Hold a copy of the memory that a tensor lies in, which is about to change."""
        index = self._known.pop(tensor.untyped_storage().data_ptr(), None)
        if index is not None:
            memory = self._pieces[index]
            assert memory is not None, "what is held is let go once the forward is over"
            self._pieces[index] = memory.clone()

    def holds(self, saved: object) -> bool:
        """Whether something stands for a tensor that lies here."""
        return isinstance(saved, _InMemory)

    def view(self, saved: _InMemory) -> torch.Tensor:
        """Return a tensor that lies here."""
        memory = self._pieces[saved.index]
        assert memory is not None, "a backward runs only after what it needs has come back"
        return _view(memory, saved.place)

    def unpack(self, saved: object) -> torch.Tensor:
        """Give autograd back what it saved."""
        if isinstance(saved, _InMemory):
            return self.view(saved)
        if isinstance(saved, _InSlot):
            if self.weights is None:
                raise ExecutionError(
                    "a layer runs a backward in its forward: that is not possible where its "
                    "activations are kept. Compute that gradient outside of the model"
                )
            return _view(self.weights, saved)
        assert isinstance(saved, torch.Tensor)
        return saved

    @property
    def nbytes(self) -> int:
        """Bytes that leave for the host, and come back."""
        return sum(aligned(size) for size in self.sizes)

    def copy_to(self, host: HostBuffer) -> None:
        """Copy to the host, on the current stream."""
        for memory, target in zip(self._pieces, self._chunks(host), strict=True):
            if memory is None:
                raise ExecutionError("saved activations left for the host twice")
            target.copy_(memory, non_blocking=True)

    def let_go(self) -> None:
        """Give the memory back."""
        self._pieces = [None] * len(self.sizes)
        self._known.clear()

    def take(self) -> None:
        """Take memory for what comes back, in the order of the current stream."""
        self._pieces = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for size in self.sizes
        ]

    def copy_from(self, host: HostBuffer) -> None:
        """Copy from the host, on the current stream."""
        for memory, source in zip(self._pieces, self._chunks(host), strict=True):
            assert memory is not None, "memory is taken before anything is copied into it"
            memory.copy_(source, non_blocking=True)

    def _chunks(self, host: HostBuffer) -> Iterator[torch.Tensor]:
        offset = 0
        for size in self.sizes:
            yield host.tensor[offset : offset + size]
            offset += aligned(size)


class SavedForward:
    """The autograd graph of one forward of a pack, and the memory that it needs.

    Attributes:
        slot: weight slot that the forward ran in: its graph ends in those parameters.
        memory: what its graph needs.
        leaves: the pack's inputs, as autograd leaves, by value.
        roots: where gradients of the pack's values enter, by value.
    """

    def __init__(self, slot: int, device: torch.device) -> None:
        self.slot = slot
        self.memory = SavedMemory(device)
        self.leaves: dict[int, torch.Tensor] = {}
        self.roots: dict[int, Root] = {}
        self._inputs: dict[int, _InMemory] = {}

    @contextmanager
    def saving(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Take what autograd saves meanwhile.

        Args:
            weights: the pack's weight slot; None if it has no parameters.
        """
        start = None if weights is None else weights.untyped_storage().data_ptr()
        memory = self.memory

        def pack(tensor: torch.Tensor) -> object:
            if not memory.is_plain(tensor):
                return tensor.detach()
            if tensor.untyped_storage().data_ptr() != start:
                return memory.hold(tensor)
            return _place_of(tensor)

        with torch.enable_grad(), saved_tensors_hooks(pack, memory.unpack):
            yield

    def finish(self, inputs: Mapping[int, torch.Tensor], made: Mapping[int, torch.Tensor]) -> None:
        """Note the leaves, and the roots of the values that the pack has made."""
        for value, leaf in inputs.items():
            self.leaves[value] = leaf
            if self.memory.is_plain(leaf):
                self._inputs[value] = self.memory.hold(leaf)
        for value, tensor in made.items():
            if tensor.requires_grad:
                # An edge, not the tensor: that would keep the memory of the value.
                self.roots[value] = get_gradient_edge(tensor)

    @contextmanager
    def reading(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Give autograd back what it saved; ``weights`` is the slot that the pack is in now."""
        self.memory.weights = weights
        try:
            yield
        finally:
            self.memory.weights = None

    def let_go(self) -> None:
        """Give the memory back; `take_memory` and `copy_from` bring what was in it back."""
        self.memory.let_go()
        for value in self._inputs:
            leaf = self.leaves[value]
            leaf.data = torch.empty(0, dtype=leaf.dtype, device=leaf.device)

    def take_memory(self) -> None:
        """Take memory for what comes back, in the order of the current stream."""
        self.memory.take()
        for value, where in self._inputs.items():
            self.leaves[value].data = self.memory.view(where)


def gradients_of(leaves: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Gradients of those inputs that have got one."""
    return {v: leaf.grad for v, leaf in leaves.items() if leaf.grad is not None}


def run_backward(pairs: Sequence[tuple[Root, torch.Tensor]]) -> None:
    """Run autograd from these roots and their gradients; from none it is nothing."""
    if pairs:
        roots: list[torch.Tensor | GradientEdge] = [root for root, _ in pairs]
        torch.autograd.backward(roots, [g for _, g in pairs])  # type: ignore[arg-type]


def _place_of(tensor: torch.Tensor) -> _InSlot:
    offset = int(tensor.storage_offset())
    return _InSlot(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), offset)


def _view(memory: torch.Tensor, place: _InSlot) -> torch.Tensor:
    found = torch.empty(0, dtype=place.dtype, device=memory.device)
    return found.set_(memory.untyped_storage(), place.offset, place.shape, place.stride)
