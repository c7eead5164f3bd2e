"""Notes the kernels that a layer calls on some samples, and a sketch of what each makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Flag
from functools import reduce
from operator import or_
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


class Origin(Flag):
    """What a tensor is computed from; of none of them it is a constant of the forward."""

    CONSTANT = 0
    TRAINED = 1  # a parameter that is trained, or a value that requires a gradient
    STATE = 2  # a buffer, or a parameter that is not trained
    INPUT = 4  # an input of the model


@dataclass(frozen=True)
class Node:
    """A call of a kernel, or a tensor that was there before (without a name).

    Attributes:
        name: of the kernel, without overload.
        place: file and line of the user's code.
        reads: the nodes that made its tensors, by position of the argument.
        origin: of all that it is computed from.
        selects: what the mask is computed from by which it takes entries; None without one.
        is_view: whether it shares the memory of what it reads.
        picked: sizes of the dimensions of which it takes entries by an index that is made of
            buffers alone.
        accumulated: size of the dimension along which it adds up entry by entry.
        numbers: of Python that it computes with.
    """

    name: str
    place: str
    reads: tuple[int, ...]
    origin: Origin
    sketch: Sketch | None
    selects: Origin | None = None
    is_view: bool = False
    picked: tuple[int, ...] = ()
    accumulated: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()

    @property
    def is_from_model(self) -> bool:
        """Whether a parameter that is trained is in it."""
        return Origin.TRAINED in self.origin

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

    def enter(self, tensor: torch.Tensor, origin: Origin, *, is_parameter: bool) -> None:
        """Note a tensor that is there before."""
        sketch = None if is_parameter else Sketch.of(tensor)
        self.nodes.append(Node("", "", (), origin, sketch))
        self._write(tensor)

    def origin(self, value: int) -> Origin:
        """Return of what a result was computed, once the layer has run."""
        node = self.results.get(value)
        return Origin.CONSTANT if node is None else self.nodes[node].origin

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
        node = Node(
            name.rstrip("_"),
            call_in_progress(),
            known,
            reduce(or_, (self.nodes[read].origin for read in known), Origin.CONSTANT),
            None,
            selects=reduce(or_, map(self._origin_of, masks)) if masks else None,
            is_view=aliases and not writes,
            picked=tuple(
                size
                for size, index in _indexed(name, args)
                if self._origin_of(index) is Origin.STATE
            ),
            accumulated=_accumulated(name, args),
            numbers=_numbers(name, args),
        )
        self._note(node, made, is_blank="empty" in name)
        return found

    def _origin_of(self, tensor: torch.Tensor) -> Origin:
        maker = self._maker(tensor)
        return Origin.CONSTANT if maker is None else self.nodes[maker].origin

    def _note(self, node: Node, made: Sequence[torch.Tensor], *, is_blank: bool) -> None:
        for tensor in made:
            storage = _storage(tensor)
            if storage is not None and is_blank:
                self._blank.add(storage)
            elif storage is not None and not node.is_view and _is_all(tensor):
                self._blank.discard(storage)
            is_known = not is_blank and not (node.is_view and storage in self._blank)
            self.nodes.append(replace(node, sketch=Sketch.of(tensor) if is_known else None))
            if node.is_view:
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
    Nor does it through a test for infinity or NaN.
    """
    if name == "mul" and any(type(factor) in (int, float) and factor == 0 for factor in args):
        return ()
    is_infinite = len(args) > 1 and type(args[1]) is float and math.isinf(args[1])
    if name in ("isinf", "isnan") or (
        name in ("eq", "ne") and (is_infinite or args[0] is args[1])
    ):
        return ()
    is_overwritten = name in ("copy_", "fill_", "zero_") and _is_all(tensors[0])
    return tensors[1:] if is_overwritten or name.startswith(_ANEW) else tensors


_ALONG = ("index_select", "gather", "index_add", "index_copy", "index_fill", "scatter")
"""What has a dimension and an index as its next arguments."""


def _indexed(name: str, args: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the sizes of dimensions that a kernel takes entries of, or writes, and the indices."""
    if name.startswith(("index_put", "_index_put", "_unsafe_index")) or name == "index":
        shape, indices = args[0].shape, args[1]
        yield from ((shape[d], index) for d, index in enumerate(indices) if index is not None)
    elif name.startswith(_ALONG) and args[0].dim():
        yield args[0].shape[args[1]], args[2]
    elif name in ("embedding", "take", "put", "put_"):
        yield args[0].shape[0] if name == "embedding" else args[0].numel(), args[1]


def _accumulated(name: str, args: Sequence[Any]) -> tuple[int, ...]:
    is_one = name.lstrip("_").startswith(("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp"))
    return (args[0].shape[args[1]],) if is_one and args[0].dim() else ()


_COMPUTING = frozenset(
    {"mul", "add", "sub", "rsub", "div", "pow", "fmod", "remainder", "clamp", "clamp_min"}
    | {"clamp_max", "lt", "le", "gt", "ge", "eq", "ne", "fill", "masked_fill", "floor_divide"}
)
"""What takes numbers of Python for values; others take them for sizes and dimensions."""


def _numbers(name: str, args: Sequence[Any]) -> tuple[float, ...]:
    known = name.rstrip("_") in _COMPUTING
    return tuple(n for n in args if type(n) in (int, float)) if known else ()


def _is_all(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all of its memory."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
