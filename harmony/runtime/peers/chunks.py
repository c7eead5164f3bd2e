"""Gradients cut into pieces of bounded size, in an order that no plan changes.

Every process exchanges the same chunks in the same order, whatever its plan is: packs may be cut
otherwise on another server. The order is that of the parameters from the last to the first, which
is about the order in which a backward makes their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

CHUNK_NBYTES = 32 * 2**20
"""Enough that a network is used well, little enough that the memory for it does not count."""


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of a gradient, in the order of its memory."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Parts of gradients of one type that are exchanged together."""

    dtype: torch.dtype
    segments: tuple[Segment, ...]

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(segment.stop - segment.start for segment in self.segments)

    def slice_numel(self, size: int) -> int:
        """Elements that each of ``size`` processes adds up: the last may have fewer of its own."""
        return -(-self.numel // size)

    def sent_nbytes(self, size: int) -> int:
        """Bytes of gradients that each of ``size`` processes sends for it."""
        return 2 * (size - 1) * self.slice_numel(size) * self.dtype.itemsize


def cut(
    gradients: Iterable[tuple[str, int, torch.dtype]], nbytes: int = CHUNK_NBYTES
) -> tuple[Chunk, ...]:
    """Cut gradients into chunks of at most so many bytes.

    Args:
        gradients: name, number of elements and type, in the order in which they are wanted.
    """
    chunks: list[Chunk] = []
    segments: list[Segment] = []
    open_dtype: torch.dtype | None = None
    room = 0

    def close() -> None:
        if segments and open_dtype is not None:
            chunks.append(Chunk(open_dtype, tuple(segments)))
        segments.clear()

    for name, numel, dtype in gradients:
        start = 0
        while start < numel:
            if dtype is not open_dtype or room == 0:
                close()
                open_dtype, room = dtype, max(1, nbytes // dtype.itemsize)
            stop = min(numel, start + room)
            segments.append(Segment(name, start, stop))
            room -= stop - start
            start = stop
    close()
    return tuple(chunks)
