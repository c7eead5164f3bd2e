"""What a module returns, as plain PyTorch sees it: its loss, and the outputs of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Samples

LossFn = Callable[[Any, Any], torch.Tensor]


def loss_of(loss_fn: LossFn | None, out: Any, targets: Any) -> torch.Tensor:
    """Return the loss: what the user's function makes, or what the module returned as its loss.

    Raises:
        ConfigError: if there is none.
    """
    if loss_fn is not None:
        found: Any = loss_fn(out, targets)
    elif isinstance(out, Mapping):
        found = out.get("loss")
    elif isinstance(out, (tuple, list)):
        found = out[0] if out else None
    else:
        found = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        return found
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    raise ConfigError(
        f"verify needs a loss to begin the backward with, a tensor of one element; got {shape}. "
        "Give Harmony(..., loss_fn=) and targets, or a batch for which the module returns its loss"
    )


class Piece:
    """The outputs of one microbatch, waiting for the gradients of the joined ones."""

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor, int | None, int, int, float]] = []

    def add(
        self,
        chunk: torch.Tensor,
        whole: torch.Tensor,
        dim: int | None,
        low: int,
        high: int,
        share: float,
    ) -> None:
        """An output, and where it is in the joined one."""
        self._parts.append((chunk, whole, dim, low, high, share))

    def backward(self) -> None:
        """Go on from the gradients that have arrived."""
        pairs = []
        for chunk, whole, dim, low, high, share in self._parts:
            if whole.grad is None:
                continue
            gradient = whole.grad
            gradient = gradient * share if dim is None else gradient.narrow(dim, low, high - low)
            pairs.append((chunk, gradient))
        if pairs:
            torch.autograd.backward([c for c, _ in pairs], [g for _, g in pairs])


def batch_dim(chunks: Sequence[torch.Tensor], every: Sequence[Samples]) -> int | None:
    """The dimension whose size goes with the number of samples; the first if several do."""
    sizes = [high - low for low, high in every]
    for dim in range(chunks[0].dim()):
        rows = {c.shape[dim] / n for c, n in zip(chunks, sizes, strict=True)}
        if len(rows) == 1 and rows.pop() >= 1:
            return dim
    return None
