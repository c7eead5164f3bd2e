"""Keeps PyTorch from choosing other kernels for a forward than for its recompute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harmony.errors import ExecutionError


@contextmanager
def as_recomputed() -> Iterator[None]:
    """Run a forward as one that a backward follows, without keeping anything for it.

    PyTorch has other kernels, with other last bits, where no gradient is recorded: attention with
    a learnt mask, transformer layers in eval mode, products of matrices that it folds. So
    ``no_grad`` would not do for a forward whose backward runs on what a recompute gives.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _nothing_was_saved)
    with torch.enable_grad(), hooks:
        yield


def _nothing_was_saved(_: Any) -> torch.Tensor:
    raise ExecutionError(
        "a layer runs a backward in its forward: that is not possible where the layer is "
        "recomputed. Compute that gradient outside of the model, or in torch.func"
    )
