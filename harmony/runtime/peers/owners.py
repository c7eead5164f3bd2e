"""Which process keeps the optimizer's state of which parameter, and updates it.

ZeRO's first stage (Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", SC 2020), by whole parameters: so any optimizer that updates parameters one by
one computes what it computes without. The largest are given away first, each to whoever has the
fewest bytes until then; parameters of one shape go round, so that all processes have some of every
part of the backward.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from operator import itemgetter

from torch import nn


class Owners:
    """Of one model, in process ``rank`` of ``size``; the same in all processes.

    Attributes:
        rank, size: of this process, and how many there are.
        of: the rank that a parameter belongs to, by name; it never changes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.of: dict[str, int] = {}
        self._loads = [(0, each) for each in range(size)]  # bytes that each has; a heap

    def assign(self, params: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Give those parameters an owner that have none; frozen ones last, as they have no state.

        Args:
            params: names and parameters, in an order that is the same in all processes.
        """
        new = [(name, param) for name, param in params if name not in self.of]
        for trained in (True, False):
            self._spread({n: p.nbytes for n, p in new if p.requires_grad is trained})

    def is_mine(self, name: str) -> bool:
        """Whether a parameter belongs to this process."""
        return self.of[name] == self.rank

    def _spread(self, nbytes: Mapping[str, int]) -> None:
        for name, size in sorted(nbytes.items(), key=itemgetter(1), reverse=True):
            held, rank = heapq.heappop(self._loads)
            self.of[name] = rank
            heapq.heappush(self._loads, (held + size, rank))
