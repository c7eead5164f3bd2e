"""What each kernel of a layer makes of samples together, compared with what it makes of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum

import torch

from harmony.engine.splitting.compare import best_groups, difference
from harmony.engine.splitting.recording import Node, Recorder, Sketch

_PERMUTING = ("index", "gather", "embedding", "scatter", "_pack", "_pad", "masked", "sort", "topk")
"""What they take by an index may be rows of samples in another order, as the tokens of experts."""


def _may_permute(node: Node, kinds: Sequence[Kind]) -> bool:
    is_given = any(kinds[read] is Kind.PERMUTED for read in node.reads)
    return is_given or any(word in node.name for word in _PERMUTING)


class Kind(Enum):
    """What the results of a kernel for samples together have to do with those for some of them."""

    CONSTANT = "the same"
    OF_SAMPLES = "they are put together"
    PERMUTED = "they are put together in another order"
    PAIRS = "they are parts of it, along several dimensions"
    PIECE = "theirs have other sizes, along one dimension"
    STATISTIC = "none of these"
    UNKNOWN = "their shapes do not tell"


ROWS = (Kind.OF_SAMPLES, Kind.PERMUTED)
"""Of results that are rows of samples."""


@dataclass
class Dataflow:
    """What a layer does with samples: runs of the same kernels on all of them and on parts.

    Attributes:
        nodes: of the run on all of them.
        results: the layer's values, and the nodes that made them.
        kinds: of each node.
        sums: of each node, whether that of all samples is the sum or the mean of those of parts.
        shifting: nodes that take entries of other samples by an index that is a state.
        counting: nodes that add up sample by sample, or compute with a number that follows from
            how many there are.
        growing: nodes that make more of more samples.
    """

    nodes: Sequence[Node]
    results: Mapping[int, int]
    kinds: Sequence[Kind]
    sums: Sequence[bool]
    shifting: Set[int]
    counting: Set[int]
    growing: Set[int]

    @classmethod
    def of(
        cls, whole: Recorder, parts: Sequence[Recorder], sizes: Sequence[int]
    ) -> Dataflow | None:
        """Return it; None where parts of the batch run other kernels than the batch.

        Args:
            sizes: of the parts, which are all of the batch.
        """
        names = [node.name for node in whole.nodes]
        if any([node.name for node in part.nodes] != names for part in parts):
            return None
        kinds, sums = [], []
        shifting, counting, growing = set(), set(), set()
        columns = zip(whole.nodes, *(part.nodes for part in parts), strict=True)
        for index, (node, *found) in enumerate(columns):
            sketches = [part.sketch for part in found]
            kinds.append(_kind(node.sketch, sketches, sizes))
            if kinds[-1] is Kind.PERMUTED and not _may_permute(node, kinds):
                kinds[-1] = Kind.STATISTIC
            sums.append(kinds[-1] is Kind.STATISTIC and _adds_up(node.sketch, sketches, sizes))
            if _add_up(node.picked, [part.picked for part in found]):
                shifting.add(index)
            is_counting = _add_up(node.accumulated, [part.accumulated for part in found])
            if is_counting or any(part.numbers != node.numbers for part in found):
                counting.add(index)
            if any(one and node.sketch and one.shape != node.sketch.shape for one in sketches):
                growing.add(index)
        return cls(whole.nodes, whole.results, kinds, sums, shifting, counting, growing)


def _kind(whole: Sketch | None, parts: Sequence[Sketch | None], sizes: Sequence[int]) -> Kind:
    found = [part for part in parts if part is not None]
    if whole is None or len(found) < len(parts):
        return Kind.UNKNOWN
    limit = whole.limit
    if all(part.shape == whole.shape for part in found):
        pairs = [(a, b) for p in found for a, b in zip(_all(p), _all(whole), strict=True)]
        same = all(difference(a, b) <= limit for a, b in pairs)
        return Kind.CONSTANT if same else Kind.STATISTIC
    kind = Kind.PAIRS if _is_square(whole.shape, [part.shape for part in found]) else Kind.UNKNOWN
    for dim in range(len(whole.shape)):
        if not all(_goes_on(part.shape, whole.shape, dim) for part in found):
            continue
        if sum(part.shape[dim] for part in found) != whole.shape[dim]:
            kind = Kind.PIECE
            continue
        norms = [part.norms[dim] for part in found]
        aligned = best_groups(norms, whole.norms[dim], 0, sum(sizes))
        if aligned is not None and aligned[1] <= limit:
            return Kind.OF_SAMPLES
        joined = torch.cat(norms).sort().values
        is_same = difference(joined, whole.norms[dim].sort().values) <= limit
        kind = Kind.PERMUTED if is_same or kind is Kind.PERMUTED else Kind.STATISTIC
    return kind


def _is_square(whole: torch.Size, parts: Sequence[torch.Size]) -> bool:
    """Whether several dimensions of the parts add up, as where each sample meets each."""
    if any(len(part) != len(whole) for part in parts):
        return False
    added = [sum(part[d] for part in parts) == size for d, size in enumerate(whole)]
    kept = [all(part[d] == size for part in parts) for d, size in enumerate(whole)]
    return sum(added) > 1 and all(a or k for a, k in zip(added, kept, strict=True))


def _add_up(whole: Sequence[int], parts: Sequence[Sequence[int]]) -> bool:
    """Whether one of the sizes is the sum of those of the parts."""
    return any(size == sum(apart) for size, *apart in zip(whole, *parts, strict=True))


def _adds_up(whole: Sketch | None, parts: Sequence[Sketch | None], sizes: Sequence[int]) -> bool:
    found = [part for part in parts if part is not None]
    if whole is None or any(part.shape != whole.shape for part in found):
        return False
    total = sum(sizes)
    for weights in ([1.0] * len(sizes), [size / total for size in sizes]):
        terms = [
            sum(part.sums[i] * w for part, w in zip(found, weights, strict=True))
            for i in range(len(whole.sums))
        ]
        pairs = zip(terms, whole.sums, strict=True)
        if all(isinstance(t, torch.Tensor) and difference(t, w) <= whole.limit for t, w in pairs):
            return True
    return False


def _goes_on(part: torch.Size, whole: torch.Size, dim: int) -> bool:
    """Whether two shapes are the same but for one dimension."""
    others = range(len(whole))
    return len(part) == len(whole) and all(part[d] == whole[d] for d in others if d != dim)


def _all(sketch: Sketch) -> tuple[torch.Tensor, ...]:
    return (*sketch.norms, *sketch.sums)
