"""Notes the kernels that a layer calls on some samples, and a sketch of what each makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmony.capture import call_in_progress
from harmony.engine.splitting.compare import tolerance
from harmony.runtime.exec.stage import Values

_Geometry = tuple[Any, ...]


@dataclass(frozen=True)
class Sketch:
    """What is kept of a tensor: little, along each dimension.

    Attributes:
        norms: per dimension the sums of absolute values of its slices.
        sums: per dimension their sums; of a scalar the scalar.
    """

    shape: torch.Size
    dtype: torch.dtype
    norms: tuple[torch.Tensor, ...]
    sums: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Sketch | None:
        """Return it on the tensor's device; None for what is empty or has no strides."""
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        numbers = tensor.is_floating_point() or tensor.is_complex()
        wide = tensor if numbers else tensor.float()
        dtype = torch.promote_types(wide.dtype, torch.float32)
        norms, sums = [], []
        for dim in range(wide.dim()):
            others = [d for d in range(wide.dim()) if d != dim]
            if others:
                norms.append(torch.linalg.vector_norm(wide, 1, others, dtype=dtype))
                sums.append(wide.sum(others, dtype=dtype))
            else:
                norms.append(wide.abs())
                sums.append(wide.to(dtype, copy=True))
        sums = sums or [wide.to(dtype, copy=True)]
        return cls(tensor.shape, tensor.dtype, tuple(norms), tuple(sums))

    @property
    def limit(self) -> float:
        """The largest difference that is rounding, relative to the largest entry."""
        numbers = self.dtype.is_floating_point or self.dtype.is_complex
        return tolerance(self.dtype) if numbers else tolerance(torch.float32)

    def on_host(self) -> Sketch:
        """Return the same on the host."""
        norms, sums = (tuple(t.cpu() for t in some) for some in (self.norms, self.sums))
        return Sketch(self.shape, self.dtype, norms, sums)


@dataclass(frozen=True)
class Node:
    """A call of a kernel, or a tensor that was there before (without a name).

    Attributes:
        name: of the kernel, without overload.
        place: file and line of the user's code.
        reads: the nodes that made its tensors, by position of the argument.
        is_from_model: whether a parameter, or a result that requires a gradient, is in it.
        selects: whether it takes entries by a mask that the model has computed.
        is_view: whether it shares the memory of what it reads.
    """

    name: str
    place: str
    reads: tuple[int, ...]
    is_from_model: bool
    sketch: Sketch | None
    selects: bool = False
    is_view: bool = False

    @property
    def is_floating_point(self) -> bool:
        """Whether it makes numbers of floating point."""
        return self.sketch is not None and self.sketch.dtype.is_floating_point

    @property
    def call(self) -> str:
        """The kernel and where it is called."""
        return f"{self.name}, called at {self.place}" if self.place else self.name


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what kernels are called, on what, and a sketch of what each makes.

    Tensors are known by their memory, which views share and operators in place write.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.results: dict[int, int] = {}
        self._made: dict[StorageWeakRef, dict[_Geometry | None, int]] = {}
        self._blank: set[StorageWeakRef] = set()  # what nothing has been written to, or not to all

    def enter(self, tensors: Iterable[torch.Tensor], *, is_from_model: bool) -> None:
        """Note tensors that are there before."""
        for tensor in tensors:
            self.nodes.append(Node("", "", (), is_from_model, None))
            self._write(tensor)

    def leave(self, results: Values) -> None:
        """Note what made the results of a layer, and bring the sketches to the host."""
        self.nodes = [
            node if node.sketch is None else replace(node, sketch=node.sketch.on_host())
            for node in self.nodes
        ]
        for value, tensor in results.items():
            found = self._maker(tensor)
            if found is not None:
                self.results[value] = found
        self._made.clear()
        self._blank.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        name = func.overloadpacket.__name__
        reads = [self._maker(tensor) for tensor in _read(name, tensors, args)]
        found = func(*args, **kwargs)
        schema = func._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        aliases = any(r.alias_info is not None for r in schema.returns)
        made = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        made = made or (tensors if writes else [])  # of a list of tensors nothing is returned
        known = tuple(r for r in reads if r is not None)
        if name in _COPIES and not known:
            return found  # of a constant, which is brought to the device once
        masks = [t for t in tensors if t.dtype is torch.bool] if name in _SELECTING else []
        masks = tensors if name == "nonzero" else masks
        chosen = any(self._is_from_model(mask) for mask in masks)
        self._note(name, known, made, is_view=aliases and not writes, selects=chosen)
        return found

    def _is_from_model(self, tensor: torch.Tensor) -> bool:
        maker = self._maker(tensor)
        return maker is not None and self.nodes[maker].is_from_model

    def _note(
        self,
        name: str,
        reads: tuple[int, ...],
        made: Sequence[torch.Tensor],
        *,
        is_view: bool,
        selects: bool,
    ) -> None:
        from_model = any(self.nodes[read].is_from_model for read in reads)
        place = call_in_progress()
        for tensor in made:
            storage = _storage(tensor)
            if storage is not None and "empty" in name:
                self._blank.add(storage)
            elif storage is not None and not is_view and _is_all(tensor):
                self._blank.discard(storage)
            is_known = "empty" not in name and not (is_view and storage in self._blank)
            sketch = Sketch.of(tensor) if is_known else None
            plain = name.rstrip("_")
            self.nodes.append(Node(plain, place, reads, from_model, sketch, selects, is_view))
            if is_view:
                self._view(tensor)
            else:
                self._write(tensor)

    def _maker(self, tensor: torch.Tensor) -> int | None:
        storage = _storage(tensor)
        made = self._made.get(storage, {}) if storage is not None else {}
        return made.get(_geometry(tensor), made.get(None))

    def _write(self, tensor: torch.Tensor) -> None:
        storage, last = _storage(tensor), len(self.nodes) - 1
        if storage is not None:
            self._made[storage] = {None: last, _geometry(tensor): last}

    def _view(self, tensor: torch.Tensor) -> None:
        storage, last = _storage(tensor), len(self.nodes) - 1
        if storage is not None:
            self._made.setdefault(storage, {None: last})[_geometry(tensor)] = last


def _storage(tensor: torch.Tensor) -> StorageWeakRef | None:
    """What tells memory apart, and does not keep it; None for what has none (sparse tensors)."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def _geometry(tensor: torch.Tensor) -> _Geometry:
    return (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


_COPIES = frozenset({"_to_copy", "clone", "detach", "alias", "lift_fresh"})
_ANEW = ("zeros_like", "ones_like", "empty_like", "full_like", "new_")
_SELECTING = frozenset({"index", "masked_select"})
"""What a mask of theirs chooses has a number of entries that follows from values."""


def _read(
    name: str, tensors: Sequence[torch.Tensor], args: Sequence[Any]
) -> Sequence[torch.Tensor]:
    """What a kernel reads of its tensors: not one that it overwrites, or that only has a form.

    Nothing comes through a factor of Python that is 0; should it be another, that is noticed.
    """
    if name == "mul" and any(type(factor) in (int, float) and factor == 0 for factor in args):
        return ()
    is_overwritten = name in ("copy_", "fill_", "zero_") and _is_all(tensors[0])
    return tensors[1:] if is_overwritten or name.startswith(_ANEW) else tensors


def _is_all(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
