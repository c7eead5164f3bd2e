"""The norm of all gradients and what clips them, in the bits of `torch.nn.utils.clip_grad_norm_`.

That norm is one of norms: of each gradient, then of those. So each can be taken as soon as its
gradient is complete, behind the backward; only the last one, over a number a parameter, waits for
all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype


@torch.no_grad()
def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """The norm of a gradient, or of norms."""
    norm: torch.Tensor = torch.linalg.vector_norm(gradient)
    return norm


@torch.no_grad()
def total_norm(params: Iterable[nn.Parameter], known: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients of these parameters, whose order the sum follows.

    Args:
        known: what `norm_of` has found for some of them, by the parameter's identity.
    """
    pairs = [(id(param), param.grad) for param in params if param.grad is not None]
    if len({(gradient.dtype, gradient.device) for _, gradient in pairs}) != 1:
        return torch.nn.utils.get_total_norm(gradient for _, gradient in pairs)  # type by type
    norms = [known[key] if key in known else norm_of(gradient) for key, gradient in pairs]
    return norm_of(torch.stack(norms))


def norms_of(
    params: Iterable[nn.Parameter], known: Mapping[int, torch.Tensor]
) -> list[torch.Tensor | None]:
    """The norm of each parameter's gradient; None where it has none."""
    return [
        None if p.grad is None else known[id(p)] if id(p) in known else norm_of(p.grad)
        for p in params
    ]


def norm_of_norms(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `total_norm` returns for gradients that have these norms, each of its gradient's type.

    Those of several types are put in the order in which `torch.nn.utils.get_total_norm` takes
    them: type by type.
    """
    if not norms:
        return torch.zeros(())
    groups = _group_tensors_by_device_and_dtype([list(norms)])
    ordered = [norm for (held, *_), _ in groups.values() for norm in held if norm is not None]
    return norm_of(torch.stack(ordered))


def clip_factor(max_norm: float, total: torch.Tensor) -> float:
    """What `torch.nn.utils.clip_grads_with_norm_` multiplies gradients by."""
    return float(torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))
