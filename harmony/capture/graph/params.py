"""The parameters and buffers of a module, and the layers that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from harmony.core.layergraph import SharedParam
from harmony.core.units import aligned


@dataclass(frozen=True)
class ParamInfo:
    """A parameter or buffer.

    Attributes:
        name: its canonical name: the first under which the module has it.
        stride: as in the module if that is dense, else contiguous.
        layer: the layer that alone uses it; None if several do, or none.
        shared_id: its ``SharedParam``, if several layers use it.
        aliases: its other names (tied parameters).
        master: the type of the module's own parameter, whose values this one has in another
            type; None where they are the same.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    requires_grad: bool
    layer: int | None = None
    shared_id: int | None = None
    aliases: tuple[str, ...] = ()
    master: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes in the arena."""
        return aligned(self.nbytes)

    @property
    def gradient_nbytes(self) -> int:
        """Bytes that its gradient takes."""
        return self.as_master().stored_nbytes if self.requires_grad else 0

    @property
    def master_nbytes(self) -> int:
        """Bytes that the module's own parameter takes beside it."""
        return 0 if self.master is None else self.as_master().stored_nbytes

    def as_master(self) -> ParamInfo:
        """The parameter as the module has it, which is the form of its gradient too."""
        return replace(self, dtype=self.master or self.dtype, master=None)


def describe_parameters(module: nn.Module, masters: Mapping[str, torch.dtype]) -> list[ParamInfo]:
    """Return the module's parameters in registration order, tied ones once.

    Args:
        masters: the type of those that have a master, by canonical name.
    """
    found = _describe(list(module.named_parameters(remove_duplicate=False)))
    return [replace(info, master=masters.get(info.name)) for info in found]


def describe_buffers(module: nn.Module) -> list[ParamInfo]:
    """Return the module's buffers in registration order, each once."""
    return _describe(list(module.named_buffers(remove_duplicate=False)))


def running_statistics(module: nn.Module) -> Iterator[str]:
    """Names of the buffers that torch's norms keep up to date in train mode, but do not use.

    Those that another module has too are left out: a norm in eval mode computes with them.
    """
    kept: dict[int, list[str]] = {}
    used: set[int] = set()
    for name, inner in module.named_modules():
        norm = isinstance(inner, _NormBase) and type(inner).__module__.startswith("torch.nn.")
        for key, buffer in inner._buffers.items():
            kept.setdefault(id(buffer), []).append(f"{name}.{key}".lstrip("."))
            if not (norm and inner.training):
                used.add(id(buffer))
    for held, names in kept.items():
        if held not in used:
            yield from names


def assign(
    params: Sequence[ParamInfo], buffers: Sequence[ParamInfo], users: Mapping[str, Sequence[int]]
) -> tuple[list[ParamInfo], list[ParamInfo], list[SharedParam]]:
    """Give each parameter and buffer its layer, and order both as in the arena.

    What several layers use becomes a ``SharedParam``; buffers too (their gradient has no bytes).
    What no layer uses has neither, and comes last.

    Args:
        users: the layers that use each name, ascending.
    """
    everything = [*params, *buffers]
    layers = {info.name: sorted(set(users.get(info.name, ()))) for info in everything}
    tied = [info for info in everything if len(layers[info.name]) > 1]
    tied.sort(key=lambda info: layers[info.name][0])
    shared = [
        SharedParam(
            i,
            t.name,
            tuple(layers[t.name]),
            t.stored_nbytes,
            t.gradient_nbytes,
            master_nbytes=t.master_nbytes,
        )
        for i, t in enumerate(tied)
    ]
    ids = {info.name: index for index, info in enumerate(tied)}

    def place(info: ParamInfo) -> ParamInfo:
        used = layers[info.name]
        if info.name in ids:
            return replace(info, shared_id=ids[info.name])
        return replace(info, layer=used[0]) if used else info

    def order(info: ParamInfo) -> tuple[bool, list[int], bool]:
        used = layers[info.name]
        return not used, used[:1], info.shared_id is not None

    placed, placed_buffers = (sorted(map(place, infos), key=order) for infos in (params, buffers))
    return placed, placed_buffers, shared


def _describe(named: Sequence[tuple[str, torch.Tensor]]) -> list[ParamInfo]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [
        ParamInfo(
            name=aliases[0],
            shape=tuple(tensors[key].shape),
            dtype=tensors[key].dtype,
            stride=dense_stride(tensors[key].shape, tensors[key].stride()),
            requires_grad=tensors[key].requires_grad,
            aliases=tuple(aliases[1:]),
        )
        for key, aliases in names.items()
    ]


def dense_stride(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The stride if it fills its memory without gaps or overlap, else the contiguous one."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1 and step != expected:
            return tuple(torch.empty(tuple(shape), device="meta").stride())
        expected *= size
    return tuple(stride)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as far as PyTorch counts; -1 if it does not."""
    return -1 if tensor.is_inference() else int(tensor._version)
