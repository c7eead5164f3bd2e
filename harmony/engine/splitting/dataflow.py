"""What of several samples the results of a layer depend on, also where they do not show it yet.

A statistic of a batch (a mean over its samples) may leave no mark on a result yet: a factor of it
is still 0, or a threshold is out of reach. So what kernels make on the way is compared too: for
samples together and apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from harmony.engine.splitting.compare import best_groups, difference
from harmony.engine.splitting.recording import Node, Recorder, Sketch

_SUMMING = frozenset({"sum", "mean", "mm", "bmm", "addmm", "dot", "mv", "nansum"})
"""What they make of a batch is a sum, or a mean, of what they make of its parts."""

_PRODUCTS = frozenset({"mul", "mm", "mv", "dot", "bmm", "addmm", "index_put"})
"""What they make of two sums is none."""

_LINEAR = _PRODUCTS | {
    *("add", "sub", "rsub", "neg", "div", "sum", "mean", "cat", "stack"),
    *("clone", "copy", "_to_copy", "_unsafe_view", "index", "masked_fill", "where"),
    *("slice_scatter", "select_scatter"),
}
"""What they, and views, make of a sum of tensors is the sum of what they make of each."""

_PERMUTING = ("index", "gather", "embedding", "scatter", "_pack", "_pad", "masked", "sort", "topk")
"""What they take by an index may be rows of samples in another order, as the tokens of experts."""


def _may_permute(node: Node, kinds: Sequence[_Kind]) -> bool:
    is_given = any(kinds[read] is _Kind.PERMUTED for read in node.reads)
    return is_given or any(word in node.name for word in _PERMUTING)


class _Kind(Enum):
    """What the results of a kernel for samples together have to do with those for some of them."""

    CONSTANT = "the same"
    OF_SAMPLES = "they are put together"
    PERMUTED = "they are put together in another order"
    PAIRS = "they are parts of it, along several dimensions"
    STATISTIC = "none of these"
    UNKNOWN = "their shapes do not tell"


_ROWS = (_Kind.OF_SAMPLES, _Kind.PERMUTED)


@dataclass
class Dataflow:
    """What a layer does with samples: runs of the same kernels on all of them and on parts.

    Attributes:
        nodes: of the run on all of them.
        results: the layer's values, and the nodes that made them.
        kinds: of each node.
        sums: of each node, whether that of all samples is the sum or the mean of those of parts.
    """

    nodes: Sequence[Node]
    results: Mapping[int, int]
    kinds: Sequence[_Kind]
    sums: Sequence[bool]

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
        for node, *found in zip(whole.nodes, *(part.nodes for part in parts), strict=True):
            sketches = [part.sketch for part in found]
            kinds.append(_kind(node.sketch, sketches, sizes))
            if kinds[-1] is _Kind.PERMUTED and not _may_permute(node, kinds):
                kinds[-1] = _Kind.STATISTIC
            sums.append(kinds[-1] is _Kind.STATISTIC and _adds_up(node.sketch, sketches, sizes))
        return cls(whole.nodes, whole.results, kinds, sums)

    def statistic_in(self, value: int) -> Node | None:
        """Return what makes a statistic of several samples that a result is computed from."""
        first: dict[int, Node] = {}
        for index, node in enumerate(self.nodes):
            inherited = next((first[read] for read in node.reads if read in first), None)
            if inherited is not None:
                first[index] = inherited
            elif (
                self.kinds[index] is _Kind.STATISTIC
                and node.sketch
                and node.sketch.dtype.is_floating_point
            ):
                first[index] = node
        return first.get(self.results.get(value, -1))

    def bend_in(self, value: int) -> Node | None:
        """Return what makes something of a sum over samples that is no sum of that of parts.

        Only of what the model has computed: what follows from inputs alone is known before.
        """
        bends = _Bends(self)
        for index, node in enumerate(self.nodes):
            bends.take(index, node)
        return bends.found.get(self.results.get(value, -1))

    def is_sum(self, index: int) -> bool:
        """Whether a statistic of all samples is the sum or the mean of those of parts."""
        name = self.nodes[index].name
        return self.sums[index] or name in _SUMMING or "loss" in name


class _Bends:
    """Goes through the kernels in order, and finds what is no sum over samples any more.

    Attributes:
        found: of each node that depends on such a kernel, the first of them.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.found: dict[int, Node] = {}
        self._flow = flow
        self._sums: set[int] = set()
        self._selected: set[int] = set()
        self._pairs: set[int] = set()

    def take(self, index: int, node: Node) -> None:
        """Take the next kernel."""
        kind = self._flow.kinds[index]
        inherited = next((self.found[r] for r in node.reads if r in self.found), None)
        if inherited is not None:
            self.found[index] = inherited
        elif any(read in self._sums for read in node.reads):
            self._take_more(index, node)
        elif any(read in self._pairs for read in node.reads) and kind not in _ROWS:
            self._take_pairs(index, node, kind)
        elif kind is _Kind.STATISTIC and node.is_from_model:
            takes_selected = any(read in self._selected for read in node.reads)
            if (takes_selected and node.name != "sum") or not self._flow.is_sum(index):
                self.found[index] = node
            self._sums.add(index)
        elif kind is _Kind.PAIRS and node.is_from_model:
            self._pairs.add(index)
        elif node.selects or any(read in self._selected for read in node.reads):
            self._selected.add(index)

    def _take_more(self, index: int, node: Node) -> None:
        """Take what works on sums."""
        if not self._is_linear(node, [read in self._sums for read in node.reads]):
            self.found[index] = node
        self._sums.add(index)

    def _take_pairs(self, index: int, node: Node, kind: _Kind) -> None:
        """Take what works on entries for pairs of samples, until it is of samples again."""
        if kind in (_Kind.PAIRS, _Kind.UNKNOWN):
            self._pairs.add(index)
        else:
            self.found[index] = node

    def _is_linear(self, node: Node, is_sum: Sequence[bool]) -> bool:
        if node.is_view or node.name not in _LINEAR:
            return node.is_view
        if node.name in ("where", "masked_fill", "index"):
            chosen = node.reads[:1] if node.name == "where" else node.reads[1:]
            return not any(self._flow.nodes[read].is_from_model for read in chosen)
        if node.name == "div":
            return not any(is_sum[1:])
        return node.name not in _PRODUCTS or sum(is_sum) == 1


def _kind(whole: Sketch | None, parts: Sequence[Sketch | None], sizes: Sequence[int]) -> _Kind:
    found = [part for part in parts if part is not None]
    if whole is None or len(found) < len(parts):
        return _Kind.UNKNOWN
    limit = whole.limit
    if all(part.shape == whole.shape for part in found):
        pairs = [(a, b) for p in found for a, b in zip(_all(p), _all(whole), strict=True)]
        same = all(difference(a, b) <= limit for a, b in pairs)
        return _Kind.CONSTANT if same else _Kind.STATISTIC
    kind = (
        _Kind.PAIRS if _is_square(whole.shape, [part.shape for part in found]) else _Kind.UNKNOWN
    )
    for dim in range(len(whole.shape)):
        if not all(_goes_on(part.shape, whole.shape, dim) for part in found):
            continue
        if sum(part.shape[dim] for part in found) != whole.shape[dim]:
            continue
        norms = [part.norms[dim] for part in found]
        aligned = best_groups(norms, whole.norms[dim], 0, sum(sizes))
        if aligned is not None and aligned[1] <= limit:
            return _Kind.OF_SAMPLES
        joined = torch.cat(norms).sort().values
        is_same = difference(joined, whole.norms[dim].sort().values) <= limit
        kind = _Kind.PERMUTED if is_same or kind is _Kind.PERMUTED else _Kind.STATISTIC
    return kind


def _is_square(whole: torch.Size, parts: Sequence[torch.Size]) -> bool:
    """Whether several dimensions of the parts add up, as where each sample meets each."""
    if any(len(part) != len(whole) for part in parts):
        return False
    added = [sum(part[d] for part in parts) == size for d, size in enumerate(whole)]
    kept = [all(part[d] == size for part in parts) for d, size in enumerate(whole)]
    return sum(added) > 1 and all(a or k for a, k in zip(added, kept, strict=True))


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
