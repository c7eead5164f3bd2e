"""Checksums of files by chunks: made while the file is written, compared while it is read.

What they are for is bits that have turned, and files that were cut off or put together wrongly;
nobody is kept from forging a checkpoint. A CRC-32 of each chunk finds that, and chunks need not
wait for each other. Intel's library computes it at some 20 GB/s a core, zlib at 1 to 3, which is
less than fast disks deliver; zlib is taken where there is no `isal` (from a checkout without
installation, for instance).
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import increment_version

from harmony.errors import ConfigError

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

CHUNK_NBYTES = 1 << 22
"""Bytes of a file that have one checksum."""

Place = tuple[int, torch.Tensor]
"""Where in a file the bytes of a tensor begin, and the tensor."""

_DIGITS = 8
_FEW_NBYTES = 1 << 20
_MOST_VIEWS = 512  # of one read; the system takes no more than 1024
_READERS = max(1, min(4, (os.cpu_count() or 1) // 4))
_SUMMERS = max(1, min(8, (os.cpu_count() or 1) // 2))


class Checksums:
    """Of a file that is being written.

    Attributes:
        nbytes: written so far.
    """

    def __init__(self) -> None:
        self.nbytes, self._crc = 0, 0
        self._whole: list[str] = []

    def add(self, part: bytes | memoryview) -> None:
        """Take in the next bytes."""
        left = memoryview(part)
        while len(left):
            taken = left[: CHUNK_NBYTES - self.nbytes % CHUNK_NBYTES]
            self._crc = crc32(taken, self._crc)
            self.nbytes += len(taken)
            left = left[len(taken) :]
            if self.nbytes % CHUNK_NBYTES == 0:
                self._end_chunk()

    def finish(self) -> str:
        """The checksums of all chunks in a row, eight digits each."""
        if self.nbytes % CHUNK_NBYTES:
            self._end_chunk()
        return "".join(self._whole)

    def _end_chunk(self) -> None:
        self._whole.append(f"{self._crc:0{_DIGITS}x}")
        self._crc = 0


class Beside:
    """A thread that does one thing while the caller does another."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._asked: queue.SimpleQueue[tuple[Checksums, memoryview] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def add(self, sums: Checksums, part: bytes | memoryview, write: Callable[[], None]) -> None:
        """Take in the next bytes of a file while they are written."""
        if len(part) < _FEW_NBYTES:
            sums.add(part)
            write()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="harmony-checksums")
            self._thread.start()
        self._asked.put((sums, memoryview(part)))
        write()
        self._done.get()

    def close(self) -> None:
        """End the thread, once it has read what it was given."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            asked[0].add(asked[1])
            self._done.put(None)


@dataclass(frozen=True)
class FileSums:
    """What a manifest knows of a file.

    Attributes:
        nbytes: its size.
        spans: first byte, end, and checksum of each part that has one.
        kind: of checksum: ``crc32`` of chunks, or ``sha256`` of the whole, as version 1 had it.
    """

    nbytes: int
    spans: Sequence[tuple[int, int, str]]
    kind: str

    @staticmethod
    def of_data(known: Mapping[str, Any]) -> FileSums:
        """Read what `Checksums` has come to.

        Raises:
            ValueError: if it is nothing of the kind.
        """
        nbytes = known.get("nbytes")
        kinds = known.keys() & {"crc32", "sha256"}
        if type(nbytes) is not int or nbytes < 0 or len(kinds) != 1:
            raise ValueError("it has a file without a size and a checksum")
        kind = kinds.pop()
        text = known[kind]
        size = CHUNK_NBYTES if kind == "crc32" else max(nbytes, 1)
        digits = _DIGITS if kind == "crc32" else 64
        number = math.ceil(nbytes / size) if kind == "crc32" else 1
        if not isinstance(text, str) or len(text) != digits * number:
            raise ValueError(f"it has a file of {nbytes} bytes without {number} checksums")
        spans = [
            (i * size, min((i + 1) * size, nbytes), text[i * digits : (i + 1) * digits])
            for i in range(number)
        ]
        return FileSums(nbytes, spans, kind)


class _Work:
    """What the readers of several files have together.

    Attributes:
        pool: threads that compute checksums.
        spare: memory for bytes of files that are for nobody, a chunk each.
        is_over: whether no more has to be read: something is damaged, or reading was interrupted.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.spare: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self.is_over = threading.Event()
        for _ in range(_READERS + 2 * _SUMMERS):
            self.spare.put(memoryview(bytearray(CHUNK_NBYTES)))


@dataclass
class _Reading:
    """A file, and where its bytes go."""

    path: Path
    known: FileSums
    places: Sequence[Place]
    _descriptor: int = -1
    _starts: list[int] = field(default_factory=list)
    _views: list[memoryview] = field(default_factory=list)
    _staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        end = 0
        places = [place for place in self.places if place[1].nbytes]
        for low, target in sorted(places, key=lambda place: place[0]):
            if low < end or low + target.nbytes > self.known.nbytes:
                raise ConfigError(f"{self.path}: it has tensors that overlap, or end behind it")
            end = low + target.nbytes
            self._starts.append(low)
            self._views.append(self._bytes_of(target))

    def _bytes_of(self, target: torch.Tensor) -> memoryview:
        flat = target.detach()
        if flat.device.type != "cpu" or not flat.is_contiguous():
            flat = torch.empty(target.shape, dtype=target.dtype)
            self._staged.append((target, flat))
        return flat.view(-1).view(torch.uint8).numpy().data

    def open(self, open_files: ExitStack) -> None:
        """Open the file; refuse one that is not there, or has another size.

        It is read by one descriptor and one thread: the system sees that it is read in a row, and
        reads ahead. Several threads in one file came to half the rate.
        """
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            open_files.callback(os.close, self._descriptor)
            nbytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise ConfigError(f"{self.path}: it cannot be read ({error})") from None
        if nbytes != self.known.nbytes:
            raise ConfigError(f"{self.path} has {nbytes} bytes instead of {self.known.nbytes}")

    def read(self, work: _Work) -> None:
        """Read the file from its first byte to its last, each byte to where it goes."""
        if self.known.kind == "sha256":
            self._read_version_1()
            return
        sums = []
        for span in self.known.spans:
            if work.is_over.is_set():
                return
            spare = work.spare.get()
            try:
                views = list(self._between(span[0], span[1], spare))
                self._read_views(span[0], views)
            except BaseException:
                work.spare.put(spare)
                raise
            sums.append(work.pool.submit(self._sum, work, span, views, spare))
        for each in sums:
            each.result()

    def _sum(
        self, work: _Work, span: tuple[int, int, str], views: list[memoryview], spare: memoryview
    ) -> None:
        crc = 0
        for view in views:
            crc = crc32(view, crc)
        work.spare.put(spare)
        self._compare(span, f"{crc:0{_DIGITS}x}")

    def _read_version_1(self) -> None:
        spare, digest = memoryview(bytearray(CHUNK_NBYTES)), hashlib.sha256()
        for at in range(0, self.known.nbytes, CHUNK_NBYTES):
            views = list(self._between(at, min(at + CHUNK_NBYTES, self.known.nbytes), spare))
            self._read_views(at, views)
            for view in views:
                digest.update(view)
        self._compare(self.known.spans[0], digest.hexdigest())

    def _read_views(self, at: int, views: Sequence[memoryview]) -> None:
        try:
            _read(self._descriptor, at, views)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: it cannot be read ({error})") from None

    def _compare(self, span: tuple[int, int, str], found: str) -> None:
        low, high, expected = span
        if found != expected:
            raise ConfigError(
                f"{self.path} is damaged: its checksum is another (of bytes {low} to {high})"
            )

    def _between(self, low: int, high: int, spare: memoryview) -> Iterator[memoryview]:
        """Memory for the bytes of a range: of tensors, and spare for what is between them."""
        number, begin = max(bisect_right(self._starts, low) - 1, 0), low
        while low < high:
            start, end = high, high
            if number < len(self._starts):
                start = min(self._starts[number], high)
                end = min(self._starts[number] + len(self._views[number]), high)
            if low < start:
                yield spare[low - begin : start - begin]  # each gap has a part of its own
            if low < end and start < high:
                held = self._views[number]
                yield held[max(low, start) - self._starts[number] : end - self._starts[number]]
            low, number = max(low, end), number + 1

    def settle(self) -> None:
        """Give tensors what was read beside them, and say that all have changed."""
        for target, flat in self._staged:
            target.copy_(flat)
        staged = {id(target) for target, _ in self._staged}
        for _, target in self.places:
            if id(target) not in staged and not target.is_inference():
                increment_version(target)  # copies of it elsewhere are no longer its own


def read_files(
    folder: Path, files: Mapping[str, FileSums], places: Mapping[str, Sequence[Place]]
) -> None:
    """Read files once, by several threads: compare all, and put the bytes of tensors in place.

    Args:
        places: by file; what of it is for nobody is compared only.

    Raises:
        ConfigError: naming the file that is missing, cut off or changed. Tensors may then have
            some of what was read.
    """
    readings = [_Reading(folder / n, files[n], places.get(n, ())) for n in sorted(files)]
    with ExitStack() as open_files:
        for reading in readings:
            reading.open(open_files)
        with ThreadPoolExecutor(_SUMMERS) as pool, ThreadPoolExecutor(_READERS) as readers:
            work = _Work(pool)
            try:
                for _ in readers.map(lambda reading: reading.read(work), readings):
                    pass
            finally:
                work.is_over.set()
    for reading in readings:
        reading.settle()


def _read(descriptor: int, at: int, views: Sequence[memoryview]) -> None:
    left = deque(views)
    while left:
        count = os.preadv(descriptor, [left[i] for i in range(min(len(left), _MOST_VIEWS))], at)
        if not count:
            raise ValueError("it was cut off")
        at += count
        while left and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]
