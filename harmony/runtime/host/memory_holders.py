"""Who else has the memory of a tensor."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Mapping

import torch

from harmony.capture.graph.params import dense_stride


def shares_memory(tensor: torch.Tensor) -> bool:
    """Whether somebody else has a tensor's memory (a view of it, say), or it must stay there."""
    if tensor.is_inference() or torch.Tensor.untyped_storage(tensor).nbytes() > tensor.nbytes:
        return True
    return any(map(operator.gt, _holders(tensor), _ALONE[tensor._is_view()]))


def overlapping(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str] | None:
    """Name two tensors on the host of which one shows what is trained in the other; None if none.

    Tensors with gaps between their elements (columns of one matrix, say) count where they start
    at the same element.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and tensor.nbytes
    )
    for (start, end, one), (then, _, other) in itertools.pairwise(spans):
        both = tensors[one], tensors[other]
        if (start == then or (then < end and all(map(_is_dense, both)))) and any(
            isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad for tensor in both
        ):
            return one, other
    return None


def _is_dense(tensor: torch.Tensor) -> bool:
    return dense_stride(tensor.shape, tensor.stride()) == tensor.stride()


def _holders(tensor: torch.Tensor) -> tuple[int, int, int]:
    """How many hold a tensor's memory, the storage's object, and the tensor it is a view of."""
    storage, base = torch.Tensor.untyped_storage(tensor), tensor._base
    uses = torch._C._storage_Use_Count(storage._cdata)
    return uses, sys.getrefcount(storage), 0 if base is None else sys.getrefcount(base)


_ALONE = {False: _holders(torch.zeros(1)), True: _holders(torch.zeros(1).view(1))}
"""What is counted for tensors that nobody else has: views, and others."""
