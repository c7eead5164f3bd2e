"""Watches kernels: which draw random numbers, and which memory they write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmony.capture.graph.params import version_of
from harmony.capture.guards.observe import unheard
from harmony.capture.trace.fake_kernels import FakeKernels

_SEEDED = torch.Tag.nondeterministic_seeded
_DYNAMIC = torch.Tag.dynamic_output_shape
_READ = torch.ops.aten._local_scalar_dense.default
# Kernels that change running statistics though their schema does not say so: the places of those
# in the arguments, and of the flag that they are in use.
_NORMS = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
}


@dataclass
class Noticed:
    """What kernels did.

    Attributes:
        drawn: whether one drew random numbers.
        on_host: whether that may have been from the CPU's generator.
        dynamic: whether the shape of a result depends on values.
        read: whether one handed a value to the host.
        written: the storages that were written to.
    """

    drawn: bool = False
    dynamic: bool = False
    read: bool = False
    on_host: bool = False
    written: set[int] = field(default_factory=set)

    def wrote(self, tensor: torch.Tensor) -> bool:
        """Whether a kernel wrote to the memory of a tensor."""
        return bool(self.written) and _storage(tensor) in self.written


class KernelWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices what kernels do beside computing their result.

    A fake kernel leaves real tensors alone that it should change: the schema tells nevertheless.

    Attributes:
        on_kernel: called with the name and the arguments of each kernel before it runs.
    """

    def __init__(self, fake: bool) -> None:
        """Watch a trace with fake parameters, or a real one."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self._kernels = FakeKernels()
        self._noticed = Noticed()
        self.on_kernel: Callable[[str, Any], None] = lambda name, args: None

    def take(self) -> Noticed:
        """Return what was noticed since this was last called."""
        noticed, self._noticed = self._noticed, Noticed()
        return noticed

    @unheard
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # Python asks for the device of a fake tensor
            return self._kernels.run(func, types, args, kwargs)
        self.on_kernel(func._schema.name, (args, kwargs))
        places, is_norm, _ = _traits(func)
        if places:
            self._note(list(_written(func, places, is_norm, args, kwargs)))
        out = self._kernels.run(func, types, args, kwargs)
        self._noticed.read |= func is _READ
        if _DYNAMIC in func.tags and not _by_integers(func, args):
            self._noticed.dynamic = True
        if draws(func, args, kwargs):
            self._noticed.drawn = True
            self._noticed.on_host |= self._is_on_host(out)
        return out

    def _note(self, tensors: Any) -> None:
        found = (t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
        self._noticed.written.update(key for key in map(_storage, found) if key is not None)

    def _is_on_host(self, out: Any) -> bool:
        """Whether what was drawn is on the CPU and would stay there on a GPU.

        In a fake trace what comes from parameters is fake and on its way to the GPU; in a real
        one, which may run on the CPU, nobody can tell.
        """
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if self._fake:
            return any(not isinstance(leaf, FakeTensor) for leaf in made)
        return any(leaf.device.type == "cpu" for leaf in made)


@cache
def _traits(func: Any) -> tuple[tuple[int, ...], bool, bool]:
    """Which arguments a kernel may write, whether it is a norm, whether it draws."""
    norm = _NORMS.get(func._schema.name)
    if norm is not None:
        return norm[0], True, False
    spec = enumerate(func._schema.arguments)
    writes = tuple(i for i, arg in spec if arg.alias_info is not None and arg.alias_info.is_write)
    return writes, False, _SEEDED in func.tags


def _written(
    func: Any, places: Sequence[int], is_norm: bool, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Any]:
    if is_norm and not args[_NORMS[func._schema.name][1]]:
        return
    names = [spec.name for spec in func._schema.arguments]
    for place in places:
        yield args[place] if place < len(args) else kwargs.get(names[place])


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a kernel draws random numbers: not with ``train=False`` or ``dropout_p=0``."""
    if not _traits(func)[2]:
        return False
    given = {spec.name: arg for spec, arg in zip(func._schema.arguments, args, strict=False)}
    given |= kwargs
    off = given.get("train") is False or given.get("training") is False
    return not off and given.get("dropout_p") != 0.0


def _storage(tensor: torch.Tensor) -> int | None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    return int(tensor.untyped_storage()._cdata)


def _by_integers(func: Any, args: Sequence[Any]) -> bool:
    """Whether an index holds no mask: its result has the shape of the indices then."""
    return func.overloadpacket is torch.ops.aten.index and all(
        index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1]
    )


def changed_by(
    tensors: Sequence[torch.Tensor], versions: Sequence[int], noticed: Noticed
) -> list[torch.Tensor]:
    """Return the tensors that a call has changed, each once."""
    pairs = zip(tensors, versions, strict=True)
    changed = (t for t, v in pairs if version_of(t) != v or noticed.wrote(t))
    return list({id(tensor): tensor for tensor in changed}.values())
