"""Nested Python structures that hold tensors, taken apart into leaves and put together again."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """What is left of a structure without its leaves.

    torch's pytrees (lists, tuples, dicts, named tuples, Hugging Face outputs), and dataclasses
    and slices that nobody registered as such.

    Attributes:
        spec: the pytree.
        num_leaves: how many leaves it takes.
        nested: per leaf of the pytree that is one of those, with tensors: the class, the names of
            its fields, and the structure of their values.
        places: where one tensor is in several places, which leaf is in each; else empty.
    """

    spec: pytree.TreeSpec
    num_leaves: int
    nested: tuple[tuple[int, type, tuple[str, ...], Structure], ...] = ()
    places: tuple[int, ...] = ()
    _names: tuple[str, ...] | None = field(default=None, init=False, compare=False, repr=False)

    def call(self, leaves: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """Build positional and keyword arguments, of which this is the structure.

        Where all of them are leaves themselves, which the first call shows, no later one has to
        look for containers.
        """
        if self._names is not None:
            start = len(leaves) - len(self._names)
            return leaves[:start], dict(zip(self._names, leaves[start:], strict=True))
        args, kwargs = self.unflatten(leaves)
        given = [*args, *kwargs.values()]
        if len(given) == len(leaves) and all(map(operator.is_, given, leaves)):
            object.__setattr__(self, "_names", tuple(kwargs))
        return args, kwargs

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """Build the structure from its leaves."""
        if self.places:
            distinct = tuple(leaves)
            leaves = [distinct[place] for place in self.places]
        if not self.nested:
            return pytree.tree_unflatten(list(leaves), self.spec)
        remaining = iter(leaves)
        containers = {index: (kind, names, inner) for index, kind, names, inner in self.nested}
        outer = []
        for index in range(self.spec.num_leaves):
            if index not in containers:
                outer.append(next(remaining))
                continue
            kind, names, inner = containers[index]
            fields = inner.unflatten([next(remaining) for _ in range(inner.num_leaves)])
            outer.append(_rebuild(kind, names, fields))
        return pytree.tree_unflatten(outer, self.spec)


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Structure]:
    """Take a structure apart into its leaves, in a fixed order.

    Args:
        is_leaf: what stays whole beside what is no container; its tensors are no leaves then.
    """
    outer, spec = pytree.tree_flatten(tree, is_leaf=is_leaf)
    leaves: list[Any] = []
    nested = []
    for index, leaf in enumerate(outer):
        names = _fields(leaf)
        if not names or not any(tensors_in(getattr(leaf, name, None)) for name in names):
            leaves.append(leaf)
            continue
        inner_leaves, inner = flatten([getattr(leaf, name) for name in names], is_leaf)
        nested.append((index, type(leaf), names, inner))
        leaves += inner_leaves
    return leaves, Structure(spec, len(leaves), tuple(nested))


def distinct_leaves(keys: Sequence[Any], structure: Structure) -> tuple[list[int], Structure]:
    """Find the leaves of a structure that are there once: a tensor stays one wherever it is.

    Args:
        keys: of each leaf; those that are the same leaf have the same.

    Returns:
        The indices of the leaves to keep, and the structure that takes those.
    """
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    if len(first) == len(keys):
        return list(range(len(keys))), structure
    kept = sorted(first.values())
    places = tuple(kept.index(first[key]) for key in keys)
    return kept, replace(structure, num_leaves=len(kept), places=places)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a structure."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _fields(leaf: Any) -> tuple[str, ...]:
    if isinstance(leaf, slice):
        return ("start", "stop", "step")
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return ()
    return tuple(field.name for field in dataclasses.fields(leaf))


def _rebuild(kind: type, names: tuple[str, ...], values: list[Any]) -> Any:
    """Make an instance without calling ``__init__``, which may compute or check things."""
    if kind is slice:
        return slice(*values)
    instance: Any = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(instance, name, value)
    return instance
