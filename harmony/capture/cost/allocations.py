"""Counts the bytes that PyTorch allocates while something runs, on fake tensors or real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULE = 512
"""Allocators round each block up to a multiple of this."""

_VIEW_COPY = torch.ops.aten.new_empty_strided.default

_aten = torch.ops.aten
_UNTOLD = frozenset({_aten.mkldnn_rnn_layer, _aten._cudnn_rnn, _aten.miopen_rnn})
"""Recurrent kernels: what they save for their backward has no size on fake tensors."""


class UntoldError(Exception):
    """Fake tensors do not tell what a kernel allocates."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the storages that are made inside it and are still alive.

    Every storage counts its bytes rounded up to ``GRANULE``, once however many views it has.

    Attributes:
        now: bytes alive.
        peak: the most that were alive after any kernel, since ``reset_peak``.
        unseen: bytes that real tensors may take beyond ``peak`` and fake ones do not: the backward
            of an in-place operation on a view copies a real tensor once more.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.unseen = 0
        self._views_changed = False
        self._sizes: dict[int, int] = {}
        self._finalizers: dict[int, Any] = {}
        for tensor in known:
            self._watch(tensor, counted=False)

    def reset_peak(self) -> None:
        """Start measuring the peak anew from what is alive now."""
        self.peak, self.unseen = self.now, 0

    def nbytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes that these tensors keep alive of what is tracked."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._sizes.get(key, 0) for key in keys)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._watch(leaf, counted=True)
        self.peak = max(self.peak, self.now)
        self._look_at_views(func, out)
        if func.overloadpacket in _UNTOLD and isinstance(out[0], FakeTensor):
            raise UntoldError(str(func))
        return out

    def _look_at_views(self, func: Any, out: Any) -> None:
        if not isinstance(out, FakeTensor):
            return
        nbytes = out.untyped_storage().nbytes()
        if func._schema.is_mutable and nbytes > out.numel() * out.element_size():
            self._views_changed = True
        elif self._views_changed and func is _VIEW_COPY:
            self.unseen = max(self.unseen, _round_up(nbytes))

    def _watch(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = _round_up(storage.nbytes()) if counted else 0
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self._finalizers[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._finalizers.pop(key, None)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // GRANULE) * GRANULE
