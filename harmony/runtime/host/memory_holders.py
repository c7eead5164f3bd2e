"""Who else has the memory of a tensor."""

from __future__ import annotations

import sys

import torch


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether somebody else has a tensor's memory (a view of it, say), or it must stay there."""
    if tensor.is_inference() or tensor.untyped_storage().nbytes() > tensor.nbytes:
        return True
    found, alone = _holders(tensor), _ALONE[tensor._is_view()]
    return any(count > expected for count, expected in zip(found, alone, strict=True))


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold the memory of a tensor, and how many the tensor that it is a view of."""
    uses = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    base = tensor._base
    return uses, 0 if base is None else sys.getrefcount(base)


_ALONE = {False: _holders(torch.zeros(1)), True: _holders(torch.zeros(1).view(1))}
"""What is counted for tensors that nobody else has: views, and others."""
