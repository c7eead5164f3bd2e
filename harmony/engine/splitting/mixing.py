"""Finds the kernel by which a result of a layer mixes samples, also where it does not show yet.

A statistic of a batch (a mean over its samples) may leave no mark on a result yet: a factor of it
is still 0, or a threshold is out of reach; a mask may keep pairs of samples apart until a count of
steps opens it. So what kernels make on the way counts, and what it is computed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch

from harmony.engine.splitting.dataflow import ROWS, Dataflow, Kind
from harmony.engine.splitting.recording import Node, Origin

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

_CUTTING = frozenset(
    {"relu", "clamp", "clamp_min", "clamp_max", "threshold", "hardtanh", "hardsigmoid"}
    | {"hardswish", "hardshrink", "softshrink", "maximum", "minimum", "relu6"}
)
"""What lets nothing through below a bound, or above."""

_CUTTING_OUT = frozenset({"slice", "narrow", "as_strided", "unfold", "split", "split_with_sizes"})
"""What makes pieces by number: of a batch other ones than of its parts."""

_PLACING = (
    *("index", "gather", "scatter", "embedding", "take", "put", "loss", "grouped", "pack", "pad"),
    *("attention", "segment", "interleave", "slice", "select"),
)
"""What takes integers for places; others take them for numbers."""


def mixing_kernel(flow: Dataflow, value: int, *, is_loss: bool) -> Node | None:
    """Return a kernel that makes a result depend on several samples; None if there is none.

    Args:
        is_loss: whether the result is a loss, which may be a sum over samples.
    """
    finders: list[_Statistics | _Bends | _Openings] = [_Statistics(flow), _Openings(flow)]
    if is_loss:
        finders[:1] = [_Bends(flow), _Weights(flow)]
    for finder in finders:
        for index, node in enumerate(flow.nodes):
            finder.take(index, node)
        found = finder.found.get(flow.results.get(value, -1))
        if found is not None:
            return found
    return None


class _Statistics:
    """Goes through the kernels in order, and finds what is computed from several samples.

    Numbers of floating point that are, stay so. Integers may be places (of tokens, of an expert's
    rows) that come out right in the end; they count where they become such numbers, or choose
    among them, and nothing of samples shows in between. So do constants that number the samples.

    Attributes:
        found: of each node that depends on a statistic, what makes the first of them.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.found: dict[int, Node] = {}
        self._flow = flow
        self._integers: dict[int, Node] = {}

    def take(self, index: int, node: Node) -> None:
        """Take the next kernel."""
        if self._comes_out_right(index, node):
            return
        if node.is_floating_point:
            found = self._read_by(node) or self._own(index, node)
            if found is not None:
                self.found[index] = found
        else:
            read = next((self._integers[r] for r in node.reads if r in self._integers), None)
            found = read or self._own(index, node)
            if found is not None:
                self._integers[index] = found

    def _own(self, index: int, node: Node) -> Node | None:
        """Return a kernel that makes one thing of several samples, if only the same for all."""
        kind = self._flow.kinds[index]
        if node.origin is Origin.CONSTANT:
            return node if kind is Kind.STATISTIC and index in self._flow.growing else None
        from_samples = any(self._flow.kinds[read] in ROWS for read in node.reads)
        is_piece = kind is Kind.PIECE and node.name in _CUTTING_OUT
        is_statistic = kind is Kind.STATISTIC or (kind is Kind.CONSTANT and from_samples)
        is_statistic |= is_piece and from_samples
        return node if is_statistic or index in self._flow.counting else None

    def _read_by(self, node: Node) -> Node | None:
        """Return the statistic that a number of floating point is made of."""
        for read in node.reads:
            if read in self.found:
                return self.found[read]
        for read in node.reads:
            if read in self._integers:
                sketch = self._flow.nodes[read].sketch
                is_mask = sketch is not None and sketch.dtype is torch.bool
                if is_mask or not any(word in node.name for word in _PLACING):
                    return self._integers[read]
        return None

    def _comes_out_right(self, index: int, node: Node) -> bool:
        """Whether integers, or constants, are those of the samples, and not the same for all."""
        kind, is_constant = self._flow.kinds[index], node.origin is Origin.CONSTANT
        if node.sketch is None or (node.is_floating_point and not is_constant):
            return node.sketch is None
        if kind not in ROWS:
            return is_constant and kind is Kind.PAIRS
        if any(read in self._integers and self._is_hidden(read) for read in node.reads):
            return False
        return not self._is_hidden(index)

    def _is_hidden(self, index: int) -> bool:
        """Whether nothing of samples shows in a result."""
        kind, sketch = self._flow.kinds[index], self._flow.nodes[index].sketch
        if kind not in ROWS or sketch is None:
            return kind is Kind.CONSTANT
        return not any(bool((norms != norms[0]).any()) for norms in sketch.norms)


class _Weights(_Statistics):
    """Finds what of each sample's loss follows from other samples, but not from the model.

    A factor of the whole loss that does is known before a step, and is no matter.
    """

    def take(self, index: int, node: Node) -> None:
        """Take the next kernel."""
        if not node.is_from_model:
            super().take(index, node)
            return
        nodes, kinds = self._flow.nodes, self._flow.kinds
        read = [r for r in node.reads if nodes[r].is_from_model]
        found = next((self.found[r] for r in read if r in self.found), None)
        if found is None and any(kinds[r] in ROWS for r in read):
            found = self._read_by(node)
        if found is not None:
            self.found[index] = found


class _Openings:
    """Goes through the kernels in order, and finds what may let samples meet in a later step.

    Attributes:
        found: of each node that depends on such a kernel, the first of them.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.found: dict[int, Node] = {}
        self._flow = flow
        self._open: dict[int, Node] = {}  # what is of pairs that may meet later, and why

    def take(self, index: int, node: Node) -> None:
        """Take the next kernel."""
        inherited = next((self.found[r] for r in node.reads if r in self.found), None)
        if inherited is not None:
            self.found[index] = inherited
            return
        kind = self._flow.kinds[index]
        opening = next((self._open[r] for r in node.reads if r in self._open), None)
        if opening is None and self._may_open(index, node, kind):
            opening = node
        if opening is None:
            return
        is_of_samples = kind not in (Kind.PAIRS, Kind.UNKNOWN) and node.is_floating_point
        if is_of_samples and node.is_from_model:
            self.found[index] = opening
        else:
            self._open[index] = opening

    def _may_open(self, index: int, node: Node, kind: Kind) -> bool:
        if index in self._flow.shifting:
            return True
        if kind is not Kind.PAIRS:
            return not node.is_floating_point and any(map(self._is_of_pairs, node.reads))
        if not node.is_from_model:
            return node.origin is not Origin.CONSTANT
        if not node.is_floating_point or node.name in _CUTTING:
            return True
        operands = [self._flow.nodes[read] for read in node.reads]
        return any(o.origin is not Origin.CONSTANT and not o.is_from_model for o in operands)

    def _is_of_pairs(self, index: int) -> bool:
        node = self._flow.nodes[index]
        is_number = node.is_from_model and node.is_floating_point
        return is_number and self._flow.kinds[index] is Kind.PAIRS


class _Bends:
    """Goes through the kernels in order, and finds what is no sum over samples any more.

    Attributes:
        found: of each node that depends on such a kernel, the first of them.
    """

    def __init__(self, flow: Dataflow) -> None:
        self.found: dict[int, Node] = {}
        self._flow = flow
        self._sums: set[int] = set()
        self._selected: dict[int, Origin] = {}
        self._pairs: set[int] = set()

    def take(self, index: int, node: Node) -> None:
        """Take the next kernel."""
        kind = self._flow.kinds[index]
        inherited = next((self.found[r] for r in node.reads if r in self.found), None)
        if inherited is not None:
            self.found[index] = inherited
        elif any(read in self._sums for read in node.reads):
            self._take_more(index, node)
        elif any(read in self._pairs for read in node.reads) and kind not in ROWS:
            self._take_pairs(index, node, kind)
        elif kind is Kind.STATISTIC and node.is_from_model:
            if self._is_mean_of_chosen(node) or not self._is_sum(index, node):
                self.found[index] = node
            self._sums.add(index)
        elif kind is Kind.PAIRS and node.is_from_model:
            self._pairs.add(index)
        else:
            chosen = [self._selected[read] for read in node.reads if read in self._selected]
            chosen += [node.selects] if node.selects else []
            if chosen:
                self._selected[index] = reduce(or_, chosen)

    def _is_mean_of_chosen(self, node: Node) -> bool:
        """Whether a kernel divides by how many entries were chosen; of targets that is known."""
        chosen = [self._selected[read] for read in node.reads if read in self._selected]
        if not chosen or node.name == "sum":
            return False
        by_model = any(Origin.TRAINED in origin for origin in chosen)
        return by_model or not node.name.startswith("nll_loss")

    def _take_more(self, index: int, node: Node) -> None:
        """Take what works on sums."""
        if not self._is_linear(node, [read in self._sums for read in node.reads]):
            self.found[index] = node
        self._sums.add(index)

    def _take_pairs(self, index: int, node: Node, kind: Kind) -> None:
        """Take what works on entries for pairs of samples, until it is of samples again."""
        if kind in (Kind.PAIRS, Kind.UNKNOWN):
            self._pairs.add(index)
        else:
            self.found[index] = node

    def _is_sum(self, index: int, node: Node) -> bool:
        """Whether a statistic of all samples is the sum or the mean of those of parts."""
        return self._flow.sums[index] or node.name in _SUMMING or "loss" in node.name

    def _is_linear(self, node: Node, is_sum: Sequence[bool]) -> bool:
        if node.is_view or node.name not in _LINEAR:
            return node.is_view
        if node.name in ("where", "masked_fill", "index"):
            chosen = node.reads[:1] if node.name == "where" else node.reads[1:]
            return not any(self._flow.nodes[read].is_from_model for read in chosen)
        if node.name == "div":
            return not any(is_sum[1:])
        return node.name not in _PRODUCTS or sum(is_sum) == 1
