"""The few samples that are tried, and what is put in the place of some of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from harmony.runtime.exec.stage import Values

Dims = Mapping[int, int | None]
"""Per value the dimension that counts samples."""

_IGNORED = -100
"""The target that PyTorch's losses leave out."""


def choose(inputs: Values, dims: Dims, num_samples: int, wanted: int) -> list[int]:
    """Return samples of a batch that differ in how many entries of theirs are 0 or less.

    What counts or masks entries does so by these, mostly: a mask, padding, ignored targets.
    """
    if wanted >= num_samples:
        return list(range(num_samples))
    score = torch.zeros(num_samples)
    for value, tensor in inputs.items():
        dim = dims[value]
        if dim is not None and not tensor.is_complex():
            flat = tensor.detach().movedim(dim, 0).reshape(num_samples, -1)
            nothing = flat == 0 if flat.is_floating_point() else flat <= 0
            score += nothing.float().mean(1).cpu()
    order = score.argsort(stable=True)
    places = torch.linspace(0, num_samples - 1, wanted).round().long()
    return [int(order[place]) for place in places]


def taken(inputs: Values, dims: Dims, which: list[int]) -> Values:
    """Return some samples of a batch, copied."""
    found = {}
    for value, tensor in inputs.items():
        dim, tensor = dims[value], tensor.detach()
        if dim is None:
            found[value] = tensor
        else:
            index = torch.tensor(which, device=tensor.device)
            found[value] = tensor.index_select(dim, index)
    return found


def with_other_neighbours(few: Values, dims: Dims, kept: int, seed: int) -> Values:
    """Return samples of which the first ``kept`` are the same, and the others are not."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for value, tensor in few.items():
        dim = dims[value]
        if dim is None:
            found[value] = tensor
            continue
        rest = tensor.narrow(dim, kept, tensor.shape[dim] - kept)
        # Rows of all samples: any entry of them is one that may occur.
        rows = torch.randint(0, tensor.shape[dim], (rest.shape[dim],), generator=generator)
        other = tensor.index_select(dim, rows.to(tensor.device))
        if tensor.dim() > 1:
            other = other.roll(1, -1 if dim != tensor.dim() - 1 else 0)
        if tensor.is_floating_point():
            spread = tensor.float().std(correction=0).clamp(min=0.1)
            noise = torch.randn(other.shape, generator=generator).to(other) * spread.to(other)
            other = other + noise
        found[value] = torch.cat([tensor.narrow(dim, 0, kept), other], dim)
    return found


def show_nothing(inputs: Values, dims: Dims, read: Collection[int]) -> bool:
    """Whether all samples are the same, in all that is read of them: as of a batch to warm up."""
    told = [(inputs[v], dims[v]) for v in read if v in inputs and dims[v] is not None]
    return bool(told) and all(_is_repeated(tensor, dim or 0) for tensor, dim in told)


def _is_repeated(tensor: torch.Tensor, dim: int) -> bool:
    return torch.equal(tensor, tensor.narrow(dim, 0, 1).expand_as(tensor))


def told_apart(inputs: Values, dims: Dims, seed: int) -> Values:
    """Return samples that differ, in place of those that are the same."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(inputs)
    for value, tensor in inputs.items():
        dim = dims[value]
        if dim is None or not tensor.numel() or not _is_repeated(tensor, dim):
            continue
        if tensor.is_floating_point() or tensor.is_complex():
            noise = torch.randn(tensor.shape, generator=generator)
            found[value] = tensor + noise.to(tensor.device).to(tensor.dtype)
            continue
        low, high = (int(bound) for bound in tensor.aminmax())
        low, high = min(low, 0), max(high, 1)  # there may be no more classes than these
        other = torch.randint(low, high + 1, tensor.shape, generator=generator)
        found[value] = other.to(tensor.device).to(tensor.dtype)
    return found


def perturbed(tensor: torch.Tensor, dim: int, seed: int, *, ignored: bool) -> torch.Tensor:
    """Return targets or a mask with other entries, in another number for each sample.

    Args:
        ignored: whether integers may become the target that PyTorch's losses ignore.
    """
    generator = torch.Generator().manual_seed(seed)
    count = tensor.shape[dim]
    odds = (torch.arange(count) + 1.0) / (count + 2.0)
    shape = [count if d == dim else 1 for d in range(tensor.dim())]
    draws = torch.rand(tensor.shape, generator=generator)
    changed = (draws < odds.view(shape)).to(tensor.device)
    if tensor.dtype is torch.bool:
        return ~changed
    if tensor.is_complex():
        return tensor
    binary = bool(((tensor == 0) | (tensor == 1)).all())
    if tensor.is_floating_point() and not binary:
        return tensor * (0.2 + 0.8 * draws).to(tensor)
    if binary and not ignored:
        return torch.where(changed, torch.zeros_like(tensor), torch.ones_like(tensor))
    if tensor.is_floating_point():
        return torch.where(changed, torch.zeros_like(tensor), torch.ones_like(tensor))
    if ignored and tensor.dtype.is_signed:
        return torch.where(changed, torch.full_like(tensor, _IGNORED), tensor)
    other = tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)]
    return torch.where(changed, other.view(tensor.shape), tensor)


_SLIGHT = 1e-2
"""Entries below it let next to nothing through."""


def unsettled(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may switch something off as it is once trained; another as it is.

    A weight of 0 or 1, or a tiny one, lets nothing of a branch through, or all of it, until it is
    trained (ReZero, LayerScale, the last layer of an adapter, a factor that is warmed up). What it
    lets through then has to show now: entries that are all the same become different ones, and
    tiny ones larger.
    """
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return tensor
    low, high = map(float, tensor.detach().aminmax())
    largest = max(high, -low)
    if not math.isfinite(largest):
        return tensor
    if low != high:
        return tensor * (10 * _SLIGHT / largest) if largest < _SLIGHT else tensor
    generator = torch.Generator().manual_seed(tensor.numel())
    other = (1.5 + torch.rand(tensor.shape, generator=generator)).to(tensor)
    return other * (10 * _SLIGHT if largest < _SLIGHT else low)
