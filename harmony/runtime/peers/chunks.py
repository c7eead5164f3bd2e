"""Gradients cut into pieces of bounded size, in an order that no plan changes.

Every process exchanges the same chunks in the same order, whatever its plan is: packs may be cut
otherwise on another server. The order is that of the parameters from the last to the first, which
is about the order in which a backward makes their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

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


@dataclass(frozen=True)
class OwnedChunk:
    """Parts of gradients of one type that are exchanged together, by the process they belong to.

    Each process adds up its own, and sends the new values of the same parameters to all.
    """

    dtype: torch.dtype
    parts: tuple[tuple[Segment, ...], ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Of all processes."""
        return tuple(segment for part in self.parts for segment in part)

    def nbytes_of(self, rank: int) -> int:
        """Bytes of what belongs to a process."""
        return sum(s.stop - s.start for s in self.parts[rank]) * self.dtype.itemsize

    def only(self, names: frozenset[str]) -> OwnedChunk:
        """What there is of it of these parameters."""
        parts = (tuple(s for s in part if s.name in names) for part in self.parts)
        return OwnedChunk(self.dtype, tuple(parts))


def cut_by_owner(
    gradients: Iterable[tuple[str, int, torch.dtype]],
    owners: Mapping[str, int],
    size: int,
    nbytes: int = CHUNK_NBYTES,
) -> tuple[OwnedChunk, ...]:
    """Cut gradients into chunks in which every process has about as many bytes of its own.

    Args:
        gradients: name, number of elements and type, in the order in which they are wanted.
        owners: the process that each belongs to, by name.
        size: how many processes there are.
    """
    given = list(gradients)
    at = {name: index for index, (name, _, _) in enumerate(given)}
    found: list[OwnedChunk] = []
    for dtype in dict.fromkeys(dtype for _, _, dtype in given):
        mine = [(name, count, kind) for name, count, kind in given if kind is dtype]
        rows = [cut((g for g in mine if owners[g[0]] == r), nbytes // size) for r in range(size)]
        for row in zip_longest(*rows):
            found.append(OwnedChunk(dtype, tuple(c.segments if c else () for c in row)))
    return tuple(sorted(found, key=lambda chunk: max(at[s.name] for s in chunk.segments)))
