"""Numbers the tensors of a forward while it is recorded."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from harmony.capture.tape import TapeValue


class Numbering:
    """The numbers of tensors; a tensor that is changed in place gets a new one.

    Every numbered tensor is kept alive, so that Python gives its id to no other.

    Attributes:
        values: what is known of each number.
    """

    def __init__(self) -> None:
        self.values: list[TapeValue] = []
        self._numbers: dict[int, int] = {}
        self._newest: dict[int, torch.Tensor] = {}
        self._storages: dict[int, int] = {}

    def __contains__(self, tensor_id: object) -> bool:
        return tensor_id in self._numbers

    def of(self, tensor: torch.Tensor) -> int:
        """The number that a tensor has now."""
        return self._numbers[id(tensor)]

    def number(self, tensor: torch.Tensor, name: str) -> int:
        """Give a tensor a number."""
        number = len(self.values)
        dense = tensor.layout is torch.strided and not tensor.is_nested
        storage = number
        if dense:
            storage = self._storages.setdefault(tensor.untyped_storage()._cdata, number)
        self.values.append(
            TapeValue(
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
        self._numbers[id(tensor)] = number
        self._newest[number] = tensor
        return number

    def renumber(self, tensor: torch.Tensor, name: str) -> tuple[int, int]:
        """Give a tensor that was changed in place a new number; return the old and the new."""
        before = self._numbers[id(tensor)]
        del self._newest[before]
        after = self.number(tensor, name)
        # The other names of the same memory now hold what was written, gradient and all.
        for number, other in self._newest.items():
            if self.values[number].storage == self.values[after].storage:
                self.values[number].requires_grad |= other.requires_grad
        return before, after
