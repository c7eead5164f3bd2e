"""Rows of samples in a tensor: those of some samples, and all of them put together again.

A value may have several rows for a sample: those of one sample after the other, or ``groups`` of
them, one after the other, each with rows of every sample. ``cat([x, y])`` has 2 groups; a sequence
whose samples are along dimension 1 has as many as time steps once these dimensions are flattened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony.planner.ir.tasks import Samples


def rows_of(
    whole: torch.Tensor, dim: int, groups: int, samples: Samples, num_samples: int
) -> torch.Tensor:
    """Return the rows of some samples; a view where there is one group.

    Args:
        dim: the dimension that counts samples.
        num_samples: that ``whole`` has rows of.
    """
    low, high = samples
    if high - low == num_samples:
        return whole
    each = whole.shape[dim] // (groups * num_samples)
    if groups == 1:
        return whole.narrow(dim, low * each, (high - low) * each)
    apart = _in_groups(whole, dim, groups)
    return apart.narrow(dim + 1, low * each, (high - low) * each).flatten(dim, dim + 1)


def joined(parts: Sequence[torch.Tensor], dim: int, groups: int) -> torch.Tensor:
    """Return the rows of all samples as a new tensor, those of the parts in order."""
    if groups == 1 or len(parts) == 1:
        return torch.cat(list(parts), dim)
    apart = [_in_groups(part, dim, groups) for part in parts]
    return torch.cat(apart, dim + 1).flatten(dim, dim + 1)


def _in_groups(tensor: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])
