"""What counts as the same: other kernels round otherwise, samples that mix differ by far more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony.runtime.exec.rows import joined

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.complex64: 2e-4}
"""Largest difference relative to the largest entry, of results that only rounding tells apart."""

LOW_PRECISION = 3e-2


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance of a type."""
    return TOLERANCE.get(dtype, LOW_PRECISION)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest entry; infinite where only one is NaN."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    found, expected = found.to(wide), expected.to(wide)
    same = (found == expected) | (found.isnan() & expected.isnan())
    if bool(same.all()):
        return 0.0
    if not bool((found.isfinite() | same).all() and (expected.isfinite() | same).all()):
        return float("inf")
    largest = expected[expected.isfinite()].abs().max()
    gap = torch.where(same, 0.0, (found - expected).abs()).max()
    return float(gap / largest) if float(largest) else float("inf")


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding at most."""
    return difference(found, expected) <= tolerance(expected.dtype)


def best_groups(
    parts: Sequence[torch.Tensor], whole: torch.Tensor, dim: int, num_samples: int
) -> tuple[int, float] | None:
    """Return the number of groups of rows by which parts make the whole best, and how well.

    None if the rows are not a multiple of the samples.
    """
    rows, rest = divmod(whole.shape[dim], num_samples)
    if rest or not rows:
        return None
    found = [
        (difference(joined(parts, dim, groups), whole), groups)
        for groups in range(1, rows + 1)
        if rows % groups == 0 and all(part.shape[dim] % groups == 0 for part in parts)
    ]
    gap, groups = min(found)
    return groups, gap
