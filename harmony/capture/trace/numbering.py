"""Numbers the tensors of a forward while it is recorded."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harmony.capture.graph.trace import TraceValue
from harmony.capture.trace.identity import IdentityMap


class Numbering:
    """The numbers of tensors; a tensor that is changed in place gets a new one.

    Attributes:
        values: what is known of each number.
    """

    def __init__(self) -> None:
        self.values: list[TraceValue] = []
        self._numbers: IdentityMap[int] = IdentityMap()
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __contains__(self, tensor_id: object) -> bool:
        return tensor_id in self._numbers

    def of(self, tensor: torch.Tensor) -> int:
        """The number that a tensor has now."""
        return self._numbers[tensor]

    def find(self, tensor: torch.Tensor) -> int | None:
        """The number that a tensor has now; None if it has none."""
        return self._numbers.get(id(tensor))

    def number(self, tensor: torch.Tensor, name: str) -> int:
        """Give a tensor a number."""
        number = len(self.values)
        dense = tensor.layout is torch.strided and not tensor.is_nested
        storage = number
        if dense:
            storage = self._storage(tensor, number)
        self.values.append(
            TraceValue(
                shape=() if tensor.is_nested else tuple(tensor.shape),
                stride=tuple(tensor.stride()) if dense else (),
                dtype=tensor.dtype,
                requires_grad=tensor.requires_grad,
                storage=storage,
                dense=dense,
                fake=isinstance(tensor, FakeTensor),
                name=name,
            )
        )
        self._numbers[tensor] = number
        return number

    def _storage(self, tensor: torch.Tensor, number: int) -> int:
        """Return the number under which the memory of a tensor was first seen."""
        storage = tensor.untyped_storage()
        key, table = storage._cdata, self._storages
        if key not in table:  # the address is used again once the memory is given back
            table[key] = (weakref.ref(storage, lambda _: table.pop(key, None)), number)
        return table[key][1]

    def renumber(self, tensor: torch.Tensor, name: str) -> tuple[int, int]:
        """Give a tensor that was changed in place a new number; return the old and the new."""
        before = self._numbers[tensor]
        after = self.number(tensor, name)
        # The other names of the same memory now hold what was written, gradient and all.
        for other, number in self._numbers.items():
            if self.values[number].storage == self.values[after].storage:
                self.values[number].requires_grad |= other.requires_grad
        return before, after
