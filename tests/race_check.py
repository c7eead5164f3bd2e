"""Finds races: pairs of conflicting memory accesses that nothing orders, whatever the timing was.

    with race_check.checked():
        train_one_step()  # on virtual GPUs; raises RaceError at the end if anything raced

A happens-before analysis of the access trace with vector clocks (Lamport 1978;
Mattern 1989), the method of data race detectors such as FastTrack (Flanagan & Freund 2009). The
actors are streams and host threads. What orders them is what orders a real GPU: a kernel follows
its enqueueing and its predecessors on the stream, a wait follows the event's recording, the host
follows what it waited for. Each byte range remembers its last write and the reads since; an
access that does not follow those it conflicts with is a race, even if this run got it right.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from harmony.errors import RaceError
from harmony.vgpu import access_trace
from tests import devices
from tests.cuda import standin

MAX_REPORTED = 10

_NAMELESS = {"A": "allocation", "F": "free", "H": "host access", "K": "kernel"}

_Clock = dict[int, int]  # actor -> how much of its history is known


@dataclass(frozen=True, slots=True)
class Operation:
    """One side of a race."""

    what: str
    actor: str
    is_write: bool
    index: int  # in the trace

    def __str__(self) -> str:
        verb = "write" if self.is_write else "read"
        return f"{verb} by '{self.what}' on {self.actor} (record {self.index})"


@dataclass(frozen=True, slots=True)
class Race:
    """Two accesses to the same bytes, at least one of them a write, that nothing orders."""

    first: Operation
    second: Operation
    ptr: int
    nbytes: int

    def __str__(self) -> str:
        return (
            f"{self.second} is not ordered after the {self.first}: "
            f"{self.nbytes} bytes at {self.ptr:#x}"
        )


@contextlib.contextmanager
def checked(*, ordered_frees: bool = False) -> Iterator[access_trace.Trace]:
    """Trace the block and analyse it at the end; an exception of the block passes unchanged.

    Real GPUs keep no trace: there nothing is looked at.

    Args:
        ordered_frees: whether the block promises to free device memory only after every use, in
            the order of the stream that it was allocated on, without `record_stream`. Then a free
            that comes too early is a race even if nobody takes the memory again.

    Raises:
        RaceError: listing the races, at most ``MAX_REPORTED``.
    """
    if devices.REAL and not standin.is_loaded():
        yield access_trace.Trace()
        return
    with access_trace.trace() as trace:
        yield trace
    races = analyse(trace.records, ordered_frees=ordered_frees)
    if races:
        shown = "\n  ".join(map(str, races[:MAX_REPORTED]))
        more = f"\n  and {len(races) - MAX_REPORTED} more" if len(races) > MAX_REPORTED else ""
        raise RaceError(
            f"{len(races)} pairs of accesses raced. Make the second stream wait for an event "
            f"recorded after the first access:\n  {shown}{more}"
        )


def analyse(records: Iterable[access_trace.Record], *, ordered_frees: bool = False) -> list[Race]:
    """Return the races in a trace, one for each pair of operations, in trace order."""
    analysis = _Analysis("KAHF" if ordered_frees else "KAH")
    for index, record in enumerate(records):
        analysis.process(index, record)
    return analysis.races


# ---------------------------------------------------------------- shadow memory


@dataclass(slots=True, eq=False)
class _Touch:
    """An access as the shadow memory remembers it: at what time of which actor."""

    actor: int
    time: int
    index: int


@dataclass(slots=True)
class _Cell:
    """What happened last to one range of bytes; the range ends where the next cell begins."""

    write: _Touch | None = None
    reads: dict[int, _Touch] = field(default_factory=dict)  # since the write, by actor


class _Shadow:
    """Cells for all addresses: sorted starts, and the cell from each start to the next."""

    def __init__(self) -> None:
        self._starts = [0]
        self._cells = [_Cell()]

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Return the indices [first, last) of the cells that cover exactly [begin, end)."""
        return self._split(begin), self._split(end)

    def _split(self, at: int) -> int:
        index = bisect_right(self._starts, at) - 1
        if self._starts[index] == at:
            return index
        cell = self._cells[index]
        self._starts.insert(index + 1, at)
        self._cells.insert(index + 1, _Cell(cell.write, dict(cell.reads)))
        return index + 1

    def cells(self, first: int, last: int) -> list[_Cell]:
        return self._cells[first:last]

    def replace(self, first: int, last: int, cell: _Cell) -> None:
        """Make one cell of several, as after a write: keeps the number of cells small."""
        self._cells[first:last] = [cell]
        del self._starts[first + 1 : last]

    def bounds(self, first: int, last: int) -> list[tuple[int, int]]:
        return list(pairwise(self._starts[first : last + 1]))


# ---------------------------------------------------------------- vector clocks


class _Analysis:
    def __init__(self, accessing: str) -> None:
        self.races: list[Race] = []
        self._accessing = accessing
        self._actors: dict[tuple[int, int], int] = {}
        self._names: list[str] = []
        self._clocks: list[_Clock] = []
        self._events: dict[int, _Clock] = {}
        self._tokens: dict[int, _Clock] = {}
        self._shadow = _Shadow()
        self._whats: dict[int, str] = {}
        self._reported: set[tuple[int, int]] = set()

    def process(self, index: int, record: access_trace.Record) -> None:
        kind = record.kind
        host = self._actor(-1, record.thread)
        stream = self._actor(record.device, record.stream) if record.stream >= 0 else host
        if kind in self._accessing and not (kind == "F" and record.stream < 0):
            self._enqueue(host, stream)
            self._whats[index] = record.what or _NAMELESS[kind]
            for access in record.accesses:
                touch = _Touch(stream, self._clocks[stream][stream], index)
                self._access(touch, access, kind == "F")
        elif kind == "R":
            self._enqueue(host, stream)
            self._events[record.aux] = self._publish(stream)
        elif kind == "W":
            self._enqueue(host, stream)
            self._join(stream, self._events.get(record.aux))
        elif kind == "E":
            self._join(host, self._events.get(record.aux))
        elif kind == "S":
            self._join(host, self._publish(stream))
        elif kind == "D":
            for (device, number), actor in list(self._actors.items()):
                if device == record.device and number >= 0:
                    self._join(host, self._publish(actor))
        elif kind == "P":
            self._tokens[record.aux] = self._publish(host)
        elif kind == "Q":
            self._join(host, self._tokens.get(record.aux))

    def _actor(self, device: int, number: int) -> int:
        """Streams are (device, stream id), host threads (-1, thread number)."""
        actor = self._actors.get((device, number))
        if actor is None:
            actor = self._actors[device, number] = len(self._clocks)
            self._clocks.append({actor: 1})
            if device >= 0:
                self._names.append(f"{access_trace.device_type()}:{device} stream {number}")
            else:
                self._names.append(f"host thread {number}")
        return actor

    def _enqueue(self, host: int, stream: int) -> None:
        """What the host thread did before happens before what it enqueues now."""
        if stream != host:
            self._join(stream, self._publish(host))

    def _publish(self, actor: int) -> _Clock:
        """Return what the actor knows; its later accesses are not part of it."""
        clock = self._clocks[actor]
        known = clock.copy()
        clock[actor] += 1
        return known

    def _join(self, actor: int, known: _Clock | None) -> None:
        if known is None:  # recorded before the trace began
            return
        clock = self._clocks[actor]
        for other, time in known.items():
            if clock.get(other, 0) < time:
                clock[other] = time

    # ---- accesses

    def _access(self, touch: _Touch, access: access_trace.Access, is_free: bool) -> None:
        shadow, clock = self._shadow, self._clocks[touch.actor]
        first, last = shadow.span(access.ptr, access.ptr + access.nbytes)
        for offset, cell in enumerate(shadow.cells(first, last)):
            before = cell.write
            if before is not None and clock.get(before.actor, 0) < before.time:
                self._report(before, touch, True, access.is_write, first + offset)
            if access.is_write:
                for read in cell.reads.values():
                    if clock.get(read.actor, 0) < read.time:
                        self._report(read, touch, False, True, first + offset)
            else:
                cell.reads[touch.actor] = touch
        # Who takes freed memory is ordered after its last use by the allocator, not by the free.
        if access.is_write and not is_free:
            shadow.replace(first, last, _Cell(touch))

    def _report(
        self, first: _Touch, second: _Touch, first_writes: bool, second_writes: bool, cell: int
    ) -> None:
        pair = (first.index, second.index)
        if pair in self._reported:
            return
        self._reported.add(pair)
        ((begin, end),) = self._shadow.bounds(cell, cell + 1)
        self.races.append(
            Race(
                self._operation(first, first_writes),
                self._operation(second, second_writes),
                begin,
                end - begin,
            )
        )

    def _operation(self, touch: _Touch, is_write: bool) -> Operation:
        what = self._whats[touch.index]
        return Operation(what, self._names[touch.actor], is_write, touch.index)
