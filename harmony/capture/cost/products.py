"""Which operators are products: dear to compute, and their results small beside what they read.

Of matrices, convolutions and attention; all else that a forward does is element by element, or
nearly, and takes the time that its bytes take. So a recompute that is given their results is
cheap, as in the selective checkpointing of PyTorch (`torch.utils.checkpoint`,
`create_selective_checkpoint_contexts`) and of Megatron-LM (Korthikanti et al., 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harmony.core.units import aligned

_aten = torch.ops.aten

_PRODUCTS = {
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten._scaled_mm,
    _aten.convolution,
    _aten._convolution,
    _aten.cudnn_convolution,
    _aten.convolution_overrideable,
    _aten._slow_conv2d_forward,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._flash_attention_forward,
    _aten._efficient_attention_forward,
}


def is_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator, as a dispatch mode sees it, is a product that draws nothing.

    Attention that drops some of its weights draws random numbers: leaving it out would leave the
    generator behind, so it is recomputed.
    """
    if getattr(func, "_overloadpacket", None) not in _PRODUCTS or func._schema.is_mutable:
        return False
    for at, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[at] if at < len(args) else kwargs.get("dropout_p", 0.0)
            return not given
    return True


class ProductBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the results of the products that are computed inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_product(func, args, kwargs or {}):
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self.nbytes += sum(aligned(t.numel() * t.element_size()) for t in made)
        return out
