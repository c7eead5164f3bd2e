"""Counts the bytes that PyTorch allocates while something runs, on fake tensors or real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULE = 512
"""Allocators round each block up to a multiple of this."""


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that are made inside it and are still alive.

    Every storage counts its bytes rounded up to ``GRANULE``, once however many views it has.

    Attributes:
        now: bytes alive.
        peak: the most that were alive after any kernel, since ``reset_peak``.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._finalizers: dict[int, Any] = {}
        for tensor in known:
            self._watch(tensor, counted=False)

    def reset_peak(self) -> None:
        """Start measuring the peak anew from what is alive now."""
        self.peak = self.now

    def nbytes(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes that these tensors keep alive of what is tracked."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._sizes.get(key, 0) for key in keys)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._watch(leaf, counted=True)
        self.peak = max(self.peak, self.now)
        return out

    def _watch(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // GRANULE) * GRANULE if counted else 0
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self._finalizers[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._finalizers.pop(key, None)
