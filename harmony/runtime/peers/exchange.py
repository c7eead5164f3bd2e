"""The gradients of one step, averaged over the processes while the backward goes on.

A chunk is exchanged as soon as its gradients are complete here and its turn has come. Process
``i`` gets everybody's slice ``i`` of it, adds these up in the order of the ranks, divides by their
number, and sends the result to all: what an all-reduce does, with the same bytes, in an order that
neither a ring nor a number of threads decides. In plain PyTorch, for each parameter::

    total = gradients[0].clone()
    for gradient in gradients[1:]:  # of process 1, 2, ...
        total += gradient
    total /= len(gradients)

A gradient that a process does not have counts as zeros, if any process has it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from harmony.errors import ConfigError, PeerError, text_of
from harmony.runtime import interrupts, native
from harmony.runtime.peers.chunks import Chunk, OwnedChunk, Segment
from harmony.runtime.peers.group import PeerGroup

MARK_NBYTES = 16
"""At the head of each row: whether its process has failed; as long as any alignment wants."""

TEXT_NBYTES = 1000
"""Of what a process says of its failure."""


@dataclass(frozen=True)
class Arrived:
    """A gradient of this process.

    Attributes:
        place: where it lies, dense, and where the average goes; None if there is no place for it.
        has_value: whether it holds one; if not, it counts as zeros.
    """

    place: torch.Tensor | None
    has_value: bool


class Exchange:
    """Of one step. `arrived`, `average` and `agree` are called by whoever trains here.

    A process that fails marks the next chunk: so all of them stop behind the same one, hear why,
    and are ready for whatever comes next.

    Attributes:
        is_agreed: whether all have come to the end, so that each may update.
    """

    def __init__(
        self, group: PeerGroup, chunks: Sequence[Chunk | OwnedChunk], names: Sequence[str]
    ) -> None:
        """Begin; the thread of the group waits for the first gradients from now on.

        Args:
            names: of all trained parameters, the same in all processes.
        """
        self._group = group
        self._chunks = chunks
        self._names = tuple(names)
        self._needed = [frozenset(s.name for s in chunk.segments) for chunk in chunks]
        self._condition = threading.Condition()
        self._gradients: dict[str, Arrived] = {}
        self._tokens = native.new_tokens(2)
        self._failed = False
        self._stopped = False
        self._ended: str | None = None
        self.is_agreed = False
        group.submit(self._swap_all, self._over)

    @property
    def has_begun(self) -> bool:
        """Whether a gradient of this process has arrived."""
        return bool(self._gradients)

    def arrived(self, gradients: Mapping[str, Arrived]) -> None:
        """Take note of gradients that are complete."""
        native.trace_release(self._tokens[0])
        with self._condition:
            self._gradients.update(gradients)
            self._condition.notify_all()

    def average(self, check: Callable[[], None] = interrupts.check) -> frozenset[str]:
        """Wait for the averages of all gradients; those that have not arrived never will.

        Args:
            check: called now and then; may raise.

        Returns:
            The parameters that have a gradient in any process; their places hold the averages.

        Raises:
            PeerError: if another process has failed, or is gone.
            ConfigError: if one has no place for a gradient that another has.
        """
        nothing = Arrived(None, has_value=False)
        self.arrived({n: nothing for n in self._names if n not in self._gradients})
        self._wait(check)
        rows = self._say("", check)
        has, lacks = self._bits(rows, 0).any(0), self._bits(rows, 1).any(0)
        bad = [
            name for name, both in zip(self._names, (has & lacks).tolist(), strict=True) if both
        ]
        if bad:
            raise ConfigError(
                f"{bad[0]} has a gradient in one process, and in another the forward of this "
                f"batch does not know it ({len(bad)} such parameters): let each forward use the "
                "same parameters, as with DistributedDataParallel. Nothing was updated"
            )
        return frozenset(
            n for n, any_has in zip(self._names, has.tolist(), strict=True) if any_has
        )

    def agree(self) -> None:
        """Hear that no process has failed until now: from here on each may update.

        It waits for nothing but what the others say: who leaves it sooner would not know whether
        they update.

        Raises:
            PeerError: if one has.
        """
        self._say("", _nothing)
        self.is_agreed = True

    # What another exchange than this one does as well: here each process updates all parameters.

    def mine(self, names: Collection[str]) -> frozenset[str]:
        """Those of these parameters that this process updates."""
        return frozenset(names)

    def approve(self, look: Callable[[], None]) -> None:
        """Look at the averages; may raise."""
        look()

    @property
    def share(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Lets all processes have a few numbers of each; None where all have the same."""
        return None

    def begin_updates(self) -> bool:
        """Hear that updates begin; return whether other processes make some for this one."""
        return False

    def updated(self, names: Collection[str]) -> None:
        """Hear that these parameters have their new values."""

    def finish(self, check: Callable[[], None] = interrupts.check) -> frozenset[str]:
        """Wait until all parameters have theirs; return those that another process has updated."""
        return frozenset()

    def fail(self, why: str, *, wait: bool = True) -> None:
        """Let the others hear that this process has failed, if they do not know yet.

        Args:
            wait: whether to return only when they do, or are gone.
        """
        if self.is_agreed:
            return
        with self._condition:
            self._failed = True
            self._condition.notify_all()
        if wait:
            with suppress(PeerError):  # of another, or nobody is there; this process says its own
                self._say(why, interrupts.check)
        else:
            row = self._row(why)
            self._group.submit(lambda: self._hear(row), _nothing)

    def _wait(self, check: Callable[[], None]) -> None:
        with self._condition:
            while not self._stopped:
                self._condition.wait(0.1)
                check()
        native.trace_acquire(self._tokens[1])

    def _say(self, why: str, check: Callable[[], None]) -> torch.Tensor:
        """Tell all whether this process has failed, and what gradients it has; hear the same."""
        return self._said(self._row(why), check)

    def _said(self, row: torch.Tensor, check: Callable[[], None]) -> torch.Tensor:
        rows = self._group.run(lambda: self._hear(row), check)
        if rows is None:
            assert self._ended is not None, "else it hears of all"
            raise PeerError(self._ended)
        return rows

    def _row(self, why: str) -> torch.Tensor:
        known = [self._gradients.get(name) for name in self._names]
        has = [gradient is not None and gradient.has_value for gradient in known]
        lacks = [gradient is None or gradient.place is None for gradient in known]
        text = why.encode()[:TEXT_NBYTES].ljust(TEXT_NBYTES, b"\0")
        return torch.tensor([*text, *has, *lacks], dtype=torch.uint8)

    def _hear(self, row: torch.Tensor) -> torch.Tensor | None:
        """On the thread of the group: exchange the rows; None once a process has failed."""
        if self._ended is not None:
            return None
        try:
            rows = self._group.gather(row)
        except PeerError as error:
            self._ended = text_of(error)
            return None
        for rank, theirs in enumerate(rows[:, :TEXT_NBYTES]):
            text = bytes(theirs.tolist()).rstrip(b"\0").decode(errors="replace")
            if text and self._ended is None:
                self._ended = (
                    f"process {rank} of {self._group.size} failed in this step: {text} "
                    f"[{self._what_is_left()}]"
                )
        return rows if self._ended is None else None

    def _what_is_left(self) -> str:
        return (
            f"Process {self._group.rank} has changed nothing either: all its parameters are of "
            "the step before"
        )

    def _bits(self, rows: torch.Tensor, which: int) -> torch.Tensor:
        start = TEXT_NBYTES + which * len(self._names)
        return rows[:, start : start + len(self._names)].bool()

    # On the thread of the group

    def _over(self) -> None:
        native.trace_release(self._tokens[1])
        with self._condition:
            self._stopped = True
            self._condition.notify_all()

    def _swap_all(self) -> None:
        try:
            for chunk, needed in zip(self._chunks, self._needed, strict=True):
                with self._condition:
                    while not self._failed and not needed.issubset(self._gradients):
                        self._condition.wait()
                    failed = self._failed
                native.trace_acquire(self._tokens[0])
                if not self._swap(chunk, failed):
                    return
        except BaseException as error:  # one that is lost is so for all that follows, too
            self._ended = text_of(error)

    def _swap(self, chunk: Chunk | OwnedChunk, failed: bool) -> bool:
        """Average a chunk; return whether no process has failed."""
        assert isinstance(chunk, Chunk)
        group, size, itemsize = self._group, self._group.size, chunk.dtype.itemsize
        numel = chunk.slice_numel(size)
        flat = self._memory("flat", size * numel * itemsize).view(chunk.dtype)
        row_nbytes = MARK_NBYTES + numel * itemsize
        rows = self._memory("sent", size * row_nbytes).view(size, row_nbytes)
        found = self._memory("found", size * row_nbytes).view(size, row_nbytes)
        if not failed:
            self._load(chunk.segments, flat)
            flat[chunk.numel :] = 0
            rows[:, MARK_NBYTES:] = flat.view(torch.uint8).view(size, numel * itemsize)
        rows[:, :MARK_NBYTES] = int(failed)
        group.swap(rows, found)
        if bool(found[:, 0].any()):
            return False
        total = self._mean([part[MARK_NBYTES:].view(chunk.dtype) for part in found])
        own = self._memory("own", numel * itemsize).copy_(total.view(torch.uint8))
        group.collect(own, flat.view(torch.uint8).view(size, numel * itemsize))
        self._store(chunk.segments, flat)
        return True

    def _mean(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Add these up in the order of the ranks, in the memory of the first, and divide."""
        total = parts[0]
        for part in parts[1:]:
            total += part
        total /= len(parts)
        return total

    def _memory(self, name: str, nbytes: int) -> torch.Tensor:
        held = self._group.scratch.get(name)
        if held is None or held.numel() < nbytes:
            held = self._group.scratch[name] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes]

    def _load(self, segments: Sequence[Segment], flat: torch.Tensor) -> None:
        start = 0
        for segment in segments:
            stop = start + segment.stop - segment.start
            gradient = self._gradients[segment.name]
            if gradient.has_value and gradient.place is not None:
                part = in_memory_order(gradient.place)[segment.start : segment.stop]
                native.trace_host_access(f"the sum of {segment.name}", part, write=False)
                flat[start:stop] = part
            else:
                flat[start:stop] = 0
            start = stop

    def _store(self, segments: Sequence[Segment], flat: torch.Tensor) -> None:
        start = 0
        for segment in segments:
            stop = start + segment.stop - segment.start
            place = self._gradients[segment.name].place
            if place is not None:
                part = in_memory_order(place)[segment.start : segment.stop]
                native.trace_host_access(f"the sum of {segment.name}", part, write=True)
                part.copy_(flat[start:stop])
            start = stop


def _nothing() -> None:
    """Accept: nobody wants to be asked."""


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
