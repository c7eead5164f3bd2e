"""Partitions of layers into packs, by dynamic programming over the places where a pack may end.

For every number of packs the partition whose slowest pack is fastest, of packs that fit. A row of
the table is solved in one pass over the places: where the last pack begins only moves forward with
where it ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from harmony.planner.ir.tasks import Pack

NEVER = float("inf")


@dataclass(frozen=True)
class Window:
    """Where packs that end at one cut may begin.

    Attributes:
        always: from this cut on, up to the end.
        odd: at these earlier cuts too, descending.
    """

    always: int
    odd: tuple[int, ...]


class PackingTable:
    """The best partitions of all beginnings of the model, by their slowest pack.

    Attributes:
        seconds: per cut those of the layers before it.
        windows: per cut the packs that end there and fit.
        entering: bytes of the values that enter a pack.
        rows: per number of packs and per cut the seconds of the slowest pack of the best
            partition of the layers before it; `NEVER` if there is none.
    """

    def __init__(
        self,
        cuts: Sequence[int],
        seconds: Sequence[float],
        windows: Sequence[Window],
        entering: Callable[[Pack], int],
    ) -> None:
        self.cuts = cuts
        self.entering = entering
        self.seconds = seconds
        self.windows = windows
        self.rows: list[list[float]] = [[0.0] + [NEVER] * (len(self.cuts) - 1)]

    def fewest(self, end: int) -> int | None:
        """The fewest packs that cover layers 0 to ``end - 1``; None if none do."""
        found = self._fewest[bisect_left(self.cuts, end)]
        return None if found == NEVER else int(found)

    def largest_last(self, end: int) -> int:
        """The first layer of the largest pack that ends at ``end``, with packs before it."""
        window = self.windows[bisect_left(self.cuts, end)]
        firsts = [*window.odd[::-1], *range(window.always, bisect_left(self.cuts, end))]
        found = (i for i in firsts if self._fewest[i] < NEVER)
        return self.cuts[next(found, 0)]

    def most(self, end: int) -> int | None:
        """The most packs that cover layers 0 to ``end - 1``; None if none do."""
        found = self._most[bisect_left(self.cuts, end)]
        return None if found < 0 else int(found)

    @cached_property
    def _most(self) -> list[float]:
        found = [0.0]
        for end in range(1, len(self.cuts)):
            window = self.windows[end]
            here = [*found[window.always : end], *(found[i] for i in window.odd)]
            found.append(1 + max(here, default=-NEVER))
        return found

    @cached_property
    def _fewest(self) -> list[float]:
        found = [0.0]
        for end in range(1, len(self.cuts)):
            window = self.windows[end]
            here = [*found[window.always : end], *(found[i] for i in window.odd)]
            found.append(1 + min(here, default=NEVER))
        return found

    def packs(self, end: int, num_packs: int) -> tuple[Pack, ...] | None:
        """The best partition of layers 0 to ``end - 1`` into that many packs; None if none."""
        at, found = bisect_left(self.cuts, end), list[Pack]()
        if num_packs >= len(self.cuts) or self._row(num_packs)[at] == NEVER:
            return None
        for k in range(num_packs, 0, -1):
            first = self._first(k, at)
            found.append(Pack(self.cuts[first], self.cuts[at]))
            at = first
        return tuple(reversed(found))

    def _row(self, num_packs: int) -> list[float]:
        """Rows are solved when somebody asks: the fewest packs that fit are few or many."""
        while len(self.rows) <= num_packs:
            self.rows.append(_extend(self.rows[-1], self.windows, self.seconds))
        return self.rows[num_packs]

    def _first(self, num_packs: int, end: int) -> int:
        """Where the last of ``num_packs`` packs before cut ``end`` begins.

        Of the best places the one where the fewest bytes cross; then the one that leaves the
        others as much time each as it takes itself.
        """
        before, slowest = self._row(num_packs - 1), self._row(num_packs)[end]
        window, seconds = self.windows[end], self.seconds
        fair = seconds[end] / num_packs
        ends: list[int] = [
            first
            for first in (*window.odd, *range(window.always, end))
            if max(before[first], seconds[end] - seconds[first]) <= slowest
        ]

        def price(first: int) -> tuple[int, float, int]:
            pack = Pack(self.cuts[first], self.cuts[end])
            uneven_s = abs(seconds[end] - seconds[first] - fair)
            return self.entering(pack), uneven_s, first

        return min(ends, key=price)


def _extend(
    before: Sequence[float], windows: Sequence[Window], seconds: Sequence[float]
) -> list[float]:
    """The row after ``before``: one pack more."""
    count = len(before)
    row = [NEVER] * count
    reached = [i for i, slowest in enumerate(before) if slowest < NEVER]
    if not reached:
        return row
    start, stop = reached[0], reached[-1]
    # A last pack takes longer the earlier it begins, the packs before it the later it begins
    # (nearly always). Where the two meet is best, and that only moves forward with the end.
    grows = all(a <= b for a, b in pairwise(before[start : stop + 1]))
    at = start
    for end in range(start + 1, count):
        window, over = windows[end], seconds[end]
        best = NEVER
        for i in window.odd:
            best = min(best, max(before[i], over - seconds[i]))
        low, high = max(window.always, start), min(end - 1, stop)
        if low <= high and grows:
            while at <= high and before[at] < over - seconds[at]:
                at += 1
            middle = min(max(low, at), high)
            best = min(best, max(before[middle], over - seconds[middle]))
            if middle > low:
                best = min(best, max(before[middle - 1], over - seconds[middle - 1]))
        elif low <= high:
            best = min(best, min(max(before[i], over - seconds[i]) for i in range(low, high + 1)))
        row[end] = best
    return row
