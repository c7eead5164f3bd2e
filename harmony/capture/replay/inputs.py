"""The inputs of the model: taken apart, cut along the batch, compared with what was captured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from harmony.capture.graph.structure import Structure, distinct_leaves, flatten
from harmony.capture.guards.holders import ATOMS
from harmony.errors import CaptureError, ConfigError

Call = tuple[Any, Any, Any]
"""Positional arguments, keyword arguments, targets."""


@dataclass(frozen=True)
class Batch:
    """The sample batch that the model was captured with.

    Attributes:
        names: per flattened input, how the user would name it: ``args[0]``, ``kwargs['mask']``.
        leaves: the flattened inputs. A tensor that is given in several places, ``model(x, x)``, is
            one input: the forward may ask whether they are the same.
        batch_dims: per leaf the dimension that counts samples; None if it has none.
        num_samples: how many samples the batch has.
    """

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: Structure
    batch_dims: tuple[int | None, ...]
    num_samples: int

    @staticmethod
    def of(
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        targets: Any,
        batch_dims: Mapping[str, int | None] = MappingProxyType({}),
        num_samples: int | None = None,
    ) -> Batch:
        """Take the inputs apart and find their batch dimensions.

        The batch is dimension 0 of the first tensor that has a dimension, in the order in which
        the caller gave them; other tensors of that many rows are batched along dimension 0 too.
        ``batch_dims`` overrides this by name.

        Args:
            num_samples: how many samples there are, where these are some of the caller's: what
                is left of a batch does not tell which of its inputs have samples.
        """
        ordered = {key: kwargs[key] for key in sorted(kwargs)}
        names = tuple(_names(args, ordered, targets))
        leaves, structure = flatten((tuple(args), ordered, targets))
        unknown = set(batch_dims).difference(names)
        if unknown:
            raise ConfigError(f"batch_dims names {sorted(unknown)}; the inputs are {names}")
        if num_samples is None:
            by_name = dict(zip(names, leaves, strict=True))
            as_given = names if list(kwargs) == list(ordered) else _names(args, kwargs, targets)
            num_samples = _count_samples([(n, by_name[n]) for n in as_given], batch_dims)
        pairs = zip(names, leaves, strict=True)
        keys = [_key(i, name, leaf, batch_dims) for i, (name, leaf) in enumerate(pairs)]
        kept, structure = distinct_leaves(keys, structure)
        if structure.places:
            names, leaves = tuple(names[i] for i in kept), [leaves[i] for i in kept]
        dims = tuple(
            batch_dims.get(name, _batch_dim(leaf, num_samples))
            for name, leaf in zip(names, leaves, strict=True)
        )
        return Batch(names, tuple(leaves), structure, dims, num_samples)

    def detached(self) -> Batch:
        """Return the batch without the graph of its tensors, to be kept.

        Their graph may lead back to the model, by hooks, through memory that Python cannot search.
        """
        leaves = [
            leaf.detach().requires_grad_(leaf.requires_grad)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in self.leaves
        ]
        return replace(self, leaves=tuple(leaves))

    def differs_in_length(self, other: Batch) -> bool:
        """Whether all that another batch may differ in is the sizes of its tensors."""
        return (self.structure, self.batch_dims) == (other.structure, other.batch_dims) and all(
            (one.dim(), one.dtype, one.requires_grad) == (two.dim(), two.dtype, two.requires_grad)
            if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
            else type(one) is type(two)
            for one, two in zip(self.leaves, other.leaves, strict=True)
        )

    def count_samples(self, other: Batch) -> int:
        """Return the number of samples of another batch with the same structure."""
        pairs = zip(other.leaves, self.batch_dims, strict=True)
        return next((leaf.shape[dim] for leaf, dim in pairs if dim is not None), 1)

    def objects(self) -> list[tuple[str, Any]]:
        """Names and values of the forward's arguments that are no tensors and may be changed."""
        pairs = zip(self.names, self.leaves, strict=True)
        plain = (torch.Tensor, *ATOMS)
        return [
            (n, x) for n, x in pairs if not isinstance(x, plain) and not n.startswith("targets")
        ]

    def part(self, args: Any, kwargs: Any, targets: Any, low: int, high: int) -> Call:
        """Return samples ``low`` to ``high - 1`` of another batch with the same structure."""
        leaves = self.match(Batch.of(args, kwargs, targets))
        parts = [
            leaf if dim is None else leaf.narrow(dim, low, high - low)
            for leaf, dim in zip(leaves, self.batch_dims, strict=True)
        ]
        some, named, target = to_call(self.structure, parts)
        # In the caller's order, by which samples are counted.
        return some, {name: named[name] for name in kwargs}, target

    def leaves_of(self, num_samples: int, device: torch.device, first: int = 0) -> list[Any]:
        """Return the leaves with this many samples, repeated as necessary.

        Args:
            first: the sample to begin with.
        """
        return [
            _take(leaf, dim, num_samples, device, first)
            for leaf, dim in zip(self.leaves, self.batch_dims, strict=True)
        ]

    def match(self, other: Batch) -> tuple[Any, ...]:
        """Return the leaves of another batch with the same structure.

        Raises:
            CaptureError: naming the argument that differs from what was captured.
        """
        if other.structure != self.structure:
            raise CaptureError(
                f"the inputs were captured as {_listed(self.names, self.leaves)}, now they are "
                f"{_listed(other.names, other.leaves)}: capture the model again for these"
            )
        sizes = {}
        for name, leaf, sample, dim in zip(
            other.names, other.leaves, self.leaves, self.batch_dims, strict=True
        ):
            if not _is_like(leaf, sample, dim):
                then, now = _shown(sample, dim, sample), _shown(leaf, dim, sample)
                raise CaptureError(
                    f"{name} was {then} when the model was captured, now it is {now}: "
                    "capture the model again for this"
                )
            if dim is not None:
                sizes[name] = leaf.shape[dim]
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"the inputs have different numbers of samples: {sizes}")
        return other.leaves


def to_call(structure: Structure, leaves: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return ``(args, kwargs, targets)``."""
    args, kwargs, targets = structure.unflatten(leaves)
    return args, kwargs, targets


def _names(args: Sequence[Any], kwargs: Mapping[str, Any], targets: Any) -> list[str]:
    """Name each leaf, in the order of the arguments."""
    groups = [
        *((f"args[{i}]", arg) for i, arg in enumerate(args)),
        *((f"kwargs[{key!r}]", value) for key, value in kwargs.items()),
        ("targets", targets),
    ]
    return [leaf for name, group in groups for leaf in _leaf_names(name, group)]


def _key(index: int, name: str, leaf: Any, batch_dims: Mapping[str, int | None]) -> Any:
    """What leaves that are one input have in common; targets are inputs of the loss."""
    if not isinstance(leaf, torch.Tensor):
        return index
    return id(leaf), name.startswith("targets"), batch_dims.get(name, "not said")


def _leaf_names(name: str, group: Any) -> list[str]:
    if isinstance(group, torch.Tensor):  # most are
        return [name]
    leaves, structure = flatten(group)
    try:
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(group)[0]]
    except ValueError:  # a container that was registered without the names of its parts
        paths = [f"<{i}>" for i in range(len(leaves))]
    if structure.nested:
        paths = [f"<{i}>" for i in range(len(leaves))]
    return [name + path for path in paths]


def _count_samples(named: Iterable[tuple[str, Any]], batch_dims: Mapping[str, int | None]) -> int:
    """Count the samples of the leaves, which come in the caller's order."""
    for name, leaf in named:
        dim = batch_dims.get(name, 0)
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and dim is not None:
            return leaf.size(dim)
    return 1


def _batch_dim(leaf: Any, num_samples: int) -> int | None:
    batched = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.size(0) == num_samples
    return 0 if batched else None


def _take(leaf: Any, dim: int | None, num_samples: int, device: torch.device, first: int) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with torch.no_grad():
        if dim is None:
            taken = leaf.to(device, copy=True)
        else:
            which = (torch.arange(num_samples, device=leaf.device) + first) % leaf.shape[dim]
            taken = leaf.index_select(dim, which).to(device)
    return taken.requires_grad_(leaf.requires_grad)


def form_of_leaf(tensor: torch.Tensor, dim: int | None) -> tuple[tuple[int, ...], Any, bool]:
    """Shape, dtype and whether it learns; all of an input's form but its number of samples."""
    shape = tuple([-1 if i == dim else size for i, size in enumerate(tensor.shape)])
    return shape, tensor.dtype, tensor.requires_grad


def _is_like(leaf: Any, sample: Any, dim: int | None) -> bool:
    """Whether a leaf is like the one that was captured."""
    if isinstance(sample, torch.Tensor):
        return isinstance(leaf, torch.Tensor) and (
            form_of_leaf(leaf, dim) == form_of_leaf(sample, dim)
        )
    return leaf is sample or (type(leaf) is type(sample) and bool(leaf == sample))


def _shown(leaf: Any, dim: int | None, sample: Any) -> str:
    """A leaf in words, as what was captured is to be compared with it."""
    if not isinstance(sample, torch.Tensor):
        return repr(leaf)
    if not isinstance(leaf, torch.Tensor):
        return type(leaf).__name__
    sizes = ["batch" if i == dim else str(size) for i, size in enumerate(leaf.shape)]
    gradient = ", requires_grad" if leaf.requires_grad else ""
    return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(sizes)}]{gradient}"


def _listed(names: Sequence[str], leaves: Sequence[Any]) -> str:
    given = (name for name, leaf in zip(names, leaves, strict=True) if leaf is not None)
    return ", ".join(given) or "nothing"
