"""Inputs and state that no recording holds: the module's own Python takes them, in one piece.

Sparse, nested and quantized tensors have no strides to cut samples by; packed sequences interleave
their samples; objects that are no known container hide their tensors; and a generator can be read
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)
_DEEPEST = 3


def form_of(tensor: torch.Tensor) -> str | None:
    """What a tensor is that has no strides over memory of its own; None for an ordinary one."""
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        return f"a tensor of layout {layout}"
    if tensor.is_quantized:
        return "a quantized tensor"
    if type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor):
        return f"a {type(tensor).__name__}, which wraps other tensors"
    return None


def irregular_input(leaves: Sequence[Any], names: Sequence[str], call: Any) -> str | None:
    """Name the input of a call that no recording holds, and what it is; None if there is none.

    Args:
        leaves, names: of the call, taken apart.
        call: the call itself.
    """
    for name, leaf in zip(names, leaves, strict=True):
        what = form_of(leaf) if isinstance(leaf, torch.Tensor) else _hidden(leaf)
        if what is not None:
            return f"{name} is {what}"
    if any(name.endswith(".batch_sizes") for name in names) and _has_packed(call):
        return "an input is a PackedSequence"
    return None


def irregular_state(net: nn.Module) -> str | None:
    """Name the tensor that a module holds and no recording does; None if there is none."""
    for prefix, module in net.named_modules():
        for held in (module.__dict__, module._parameters, module._buffers):
            for name, tensor in held.items():
                what = form_of(tensor) if isinstance(tensor, torch.Tensor) else None
                if what is not None:
                    return f"{prefix}.{name} is {what}".removeprefix(".")
    return None


def _has_packed(call: Any) -> bool:
    leaves = pytree.tree_leaves(call, is_leaf=is_packed)
    return any(map(is_packed, leaves))


def is_packed(held: Any) -> bool:
    """Whether a value is a packed sequence, part of which stays on the CPU wherever it goes."""
    return isinstance(held, PackedSequence)


def moves(leaf: Any) -> bool:
    """Whether a value of a structure goes to a device, as what is of the CPU only does not."""
    if not isinstance(leaf, torch.Tensor):
        return is_packed(leaf)
    nested = leaf.is_nested and leaf.layout is torch.strided
    return not (leaf.is_mkldnn or leaf.is_quantized or nested)


def _hidden(leaf: Any) -> str | None:
    """How an input that is no tensor holds data."""
    if isinstance(leaf, (*_PLAIN, nn.Module)):
        return None
    if isinstance(leaf, Iterator):
        return f"a {type(leaf).__name__}, which can be read once"
    if hasattr(type(leaf), "__array__") and getattr(leaf, "ndim", True):
        return f"an array ({type(leaf).__name__})"
    if _holds_data(leaf, 0):
        return f"a {type(leaf).__name__}, which holds tensors or arrays"
    return None


def _holds_data(held: Any, depth: int) -> bool:
    if isinstance(held, torch.Tensor):
        return True
    if isinstance(held, _PLAIN) or depth > _DEEPEST or callable(held):
        return False
    if hasattr(type(held), "__array__"):
        return bool(getattr(held, "ndim", 1))
    if isinstance(held, Mapping):
        return any(_holds_data(inner, depth + 1) for inner in held.values())
    if isinstance(held, (list, tuple, Set)):
        return any(_holds_data(inner, depth + 1) for inner in held)
    slots = [name for kind in type(held).__mro__ for name in _slots_of(kind)]
    attributes = [*getattr(held, "__dict__", {}).values()]
    attributes += [getattr(held, name) for name in slots if hasattr(held, name)]
    return any(_holds_data(inner, depth + 1) for inner in attributes)


def _slots_of(kind: type) -> Sequence[str]:
    found = kind.__dict__.get("__slots__", ())
    named = (found,) if isinstance(found, str) else tuple(found)
    return [name for name in named if name not in ("__dict__", "__weakref__")]
