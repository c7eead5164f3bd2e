"""Modules that compute in fp32 inside of a model whose precision is another."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map

M = TypeVar("M", bound=nn.Module)


def keep_fp32(module: M, *, output_dtype: torch.dtype | None = None) -> M:
    """Let a module inside of a model compute in fp32, whatever ``precision=`` says of the model.

    It is a policy of the module's own, as of PyTorch's FSDP2: its parameters stay what they are,
    its arguments of floating point are cast to fp32, and what it returns to ``output_dtype``. That
    computes the bits of ``fully_shard(module, mp_policy=MixedPrecisionPolicy(torch.float32,
    torch.float32, output_dtype))``. Call it before the model is wrapped::

        for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm)):
            harmony.keep_fp32(norm, output_dtype=torch.bfloat16)
        model = harmony.Harmony(net, precision="bf16", ...)

    Args:
        output_dtype: what the layers behind it compute in; None: fp32, as it comes.

    Returns:
        The module.
    """
    module.register_forward_pre_hook(_cast_arguments, with_kwargs=True)
    if output_dtype is not None:
        module.register_forward_hook(partial(_cast_output, output_dtype))
    return module


def names_kept(root: nn.Module) -> frozenset[str]:
    """Names of the parameters of those modules, as `nn.Module.named_parameters` has them."""
    kept = [m for m in root.modules() if _cast_arguments in m._forward_pre_hooks.values()]
    held = {id(param) for module in kept for param in module.parameters()}
    return frozenset(name for name, param in root.named_parameters() if id(param) in held)


def _cast_arguments(_: nn.Module, args: Any, kwargs: Any) -> Any:
    cast = partial(_cast, torch.float32)
    return tree_map(cast, args), tree_map(cast, kwargs)


def _cast_output(dtype: torch.dtype, _: nn.Module, __: Any, output: Any) -> Any:
    return tree_map(partial(_cast, dtype), output)


def _cast(dtype: torch.dtype, held: Any) -> Any:
    is_cast = isinstance(held, torch.Tensor) and held.is_floating_point()
    return held.to(dtype) if is_cast else held
