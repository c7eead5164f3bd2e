"""Batches of a step as one: the same tree of tensors, one behind the other along dimension 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def joined(batches: Sequence[Any]) -> Any:
    """Return several batches as one, or None if they are not alike.

    They are if they are the same tree of mappings, tuples and lists of tensors of the same shapes
    and types, all of as many samples.
    """
    if len(batches) < 2:
        return None
    forms = [_form(batch) for batch in batches]
    sizes = {shape[0] for shape, _ in _leaves(forms[0])} if forms[0] is not None else set()
    if len(sizes) != 1 or any(form != forms[0] for form in forms):
        return None
    return _cat(batches)


def _form(batch: Any) -> Any:
    """Shapes and types of the tensors, in their tree; None if there is anything else in it."""
    if isinstance(batch, torch.Tensor):
        return _Leaf((batch.shape, batch.dtype)) if batch.dim() else None
    values = _values(batch)
    if not values:
        return None
    forms = [_form(value) for value in values]
    if any(form is None for form in forms):
        return None
    keys = tuple(batch) if isinstance(batch, Mapping) else type(batch).__name__
    return keys, forms


class _Leaf(tuple[torch.Size, torch.dtype]):
    """Shape and type of a tensor."""


def _leaves(form: Any) -> list[_Leaf]:
    if isinstance(form, _Leaf):
        return [form]
    return [leaf for part in form[1] for leaf in _leaves(part)]


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if type(batch) in (tuple, list) else []


def _cat(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(batches))
    if isinstance(first, Mapping):
        return {name: _cat([batch[name] for batch in batches]) for name in first}
    return type(first)(_cat(part) for part in zip(*batches, strict=True))
