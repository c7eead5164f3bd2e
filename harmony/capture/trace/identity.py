"""What is known of tensors, by identity, for as long as they live."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class IdentityMap(Generic[T]):
    """Maps tensors to something. It keeps none of them alive, and forgets those that die.

    A Python id alone would not do: it is used again for another tensor.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], T]] = {}

    def __setitem__(self, tensor: torch.Tensor, known: T) -> None:
        key, table = id(tensor), self._known
        table[key] = (weakref.ref(tensor, lambda _: table.pop(key, None)), known)

    def __getitem__(self, tensor: torch.Tensor) -> T:
        return self._known[id(tensor)][1]

    def __contains__(self, tensor_id: object) -> bool:
        """Whether the tensor of this id is known."""
        return tensor_id in self._known

    def get(self, tensor_id: int) -> T | None:
        """Return what is known of the tensor of this id, or None."""
        found = self._known.get(tensor_id)
        return None if found is None else found[1]

    def items(self) -> list[tuple[torch.Tensor, T]]:
        """Return the tensors that live, and what is known of each."""
        pairs = ((ref(), known) for ref, known in list(self._known.values()))
        return [(tensor, known) for tensor, known in pairs if tensor is not None]
