"""Which packs fit, and the best packings of them, by exact dynamic programming.

A packing is a path over the places between layers; each pack that fits is an edge. The path of the
least sum of pack times is the best there can be where a GPU runs one task after the other; where
tasks take turns on several GPUs, the paths whose longest pack is shortest, for every number of
packs, are where a search begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harmony.planner.ir.tasks import Pack, TaskKind
from research.original.profile import PaperProfile
from research.original.traffic import backward_nbytes, forward_nbytes

Weight = Callable[[int, int], float]
"""Seconds that a pack of layers ``first`` to ``last - 1`` takes."""

Row = list[tuple[float, float, int]]


class Ranges:
    """Packs of one kind at one microbatch size that fit into a GPU's memory.

    Attributes:
        ends: per first layer the places where a pack may end, ascending.
        free: per first layer and end the bytes left.
    """

    def __init__(
        self, profile: PaperProfile, kind: TaskKind, num_samples: int, memory_nbytes: float
    ) -> None:
        self.num_samples = num_samples
        self.num_layers = profile.num_layers
        self.free: list[dict[int, float]] = []
        for first in range(profile.num_layers):
            row: dict[int, float] = {}
            for last in range(first + 1, profile.num_layers + 1):
                pack = Pack(first, last)
                if kind is TaskKind.FORWARD:
                    needed = forward_nbytes(profile, pack, num_samples, 0)
                else:
                    needed = backward_nbytes(profile, pack, num_samples)
                if needed <= memory_nbytes:
                    row[last] = memory_nbytes - needed
                elif needed > 2 * memory_nbytes:
                    # What leaves a pack may make a longer one smaller, but not by so much.
                    break
            self.free.append(row)
        self.ends = [list(row) for row in self.free]

    def with_stashes(self, sums: Sequence[int]) -> Ranges:
        """Those that fit with stashes; ``sums``: bytes a sample of those before each place."""
        found = object.__new__(Ranges)
        found.num_samples, found.num_layers = self.num_samples, self.num_layers
        found.free = [
            {
                last: free
                for last, free in row.items()
                if last < len(sums) and free >= self.num_samples * (sums[last] - sums[first])
            }
            for first, row in enumerate(self.free)
        ]
        found.ends = [list(row) for row in found.free]
        return found

    def fewest(self) -> list[int]:
        """Per place the fewest packs that reach it; more than there are layers if none do."""
        counts = [0] + [self.num_layers + 1] * self.num_layers
        for first, ends in enumerate(self.ends):
            more = counts[first] + 1
            for last in ends:
                if counts[last] > more:
                    counts[last] = more
        return counts


def least_sum(ranges: Ranges, weight: Weight) -> tuple[list[float], list[int]]:
    """Per place the least time of packs that reach it (``inf`` if none), and the last one's first.

    Exact: every packing is a path, and times of packs add up.
    """
    best = [0.0] + [float("inf")] * ranges.num_layers
    came = [-1] * (ranges.num_layers + 1)
    for first, ends in enumerate(ranges.ends):
        so_far = best[first]
        if so_far == float("inf"):
            continue
        for last in ends:
            total = so_far + weight(first, last)
            if total < best[last]:
                best[last], came[last] = total, first
    return best, came


def walk_back(came: Sequence[int], end: int) -> list[int]:
    """The places of a path that `least_sum` found."""
    found = [end]
    while end:
        end = came[end]
        found.append(end)
    return found[::-1]


class Balanced:
    """Per number of packs and place: the packing whose longest pack is shortest.

    Of those the one with the least sum. ``rows[k][end]`` is the longest, the sum, and where the
    last pack begins; a first of -1 says that there is none.
    """

    def __init__(self, ranges: Ranges, weight: Weight, max_packs: int) -> None:
        size, nothing = ranges.num_layers + 1, (float("inf"), float("inf"), -1)
        weights = [{b: weight(a, b) for b in ends} for a, ends in enumerate(ranges.ends)]
        self.weights = weights
        self.rows: list[Row] = [[(0.0, 0.0, 0)] + [nothing] * (size - 1)]
        for _ in range(max_packs):
            before, row = self.rows[-1], [nothing] * size
            for first, edges in enumerate(weights):
                longest, total, came = before[first]
                if came < 0:
                    continue
                for last, seconds in edges.items():
                    most = seconds if seconds > longest else longest
                    old = row[last]
                    if most < old[0] or (most == old[0] and total + seconds < old[1]):
                        row[last] = (most, total + seconds, first)
            self.rows.append(row)

    def packing(self, num_packs: int, end: int) -> list[int]:
        """The places of a packing."""
        found = [end]
        for row in reversed(self.rows[1 : num_packs + 1]):
            end = row[end][2]
            found.append(end)
        return found[::-1]
