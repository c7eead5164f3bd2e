"""The exchange of one step where each parameter belongs to one process, which updates it.

A chunk holds parameters of every process. Behind the backward each process gets everybody's
gradients of its own ones and adds them up, in the order of the ranks, as `Exchange` does; then it
updates these parameters, and all get their new values while the other updates go on: what is sent
is what an all-reduce of the gradients sends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from harmony.errors import NonFiniteError, text_of
from harmony.runtime import interrupts, native
from harmony.runtime.changes import note_changes
from harmony.runtime.peers.chunks import Chunk, OwnedChunk, Segment
from harmony.runtime.peers.exchange import MARK_NBYTES, Exchange, in_memory_order
from harmony.runtime.peers.group import WHOLE, PeerGroup
from harmony.runtime.peers.owners import Owners


class ShardedExchange(Exchange):
    """Of one step whose updates are shared out."""

    def __init__(
        self,
        group: PeerGroup,
        chunks: Sequence[OwnedChunk],
        names: Sequence[str],
        owners: Owners,
        params: Mapping[str, torch.Tensor],
        looks: bool,
    ) -> None:
        """Begin, as `Exchange` does.

        Args:
            owners: of the parameters.
            params: all of the model, in its order; new values go into them.
            looks: whether gradients that are not finite are refused.
        """
        self._owners, self._params, self._looks = owners, dict(params), looks
        self._updated: set[str] = set()
        self._names_now: frozenset[str] = frozenset()
        self._is_gathering = self._is_over = False
        self._owned = tuple(chunks)
        group.after = WHOLE
        super().__init__(group, chunks, names)

    def average(self, check: Callable[[], None] = interrupts.check) -> frozenset[str]:
        """Do what `Exchange.average` does; the averages of `mine` only lie in their places."""
        self._names_now = super().average(check)
        return self._names_now

    def mine(self, names: Collection[str]) -> frozenset[str]:
        """Those of these parameters that this process updates."""
        return frozenset(n for n in names if self._owners.is_mine(n))

    def approve(self, look: Callable[[], None]) -> None:
        """Let what the look of any process refuses be refused in all.

        Raises:
            NonFiniteError: in all of them.
        """
        if not self._looks:
            look()
            return
        said = ""
        try:
            look()
        except NonFiniteError as error:
            said = text_of(error)
        found = self._share(torch.tensor([bool(said)], dtype=torch.float64))[:, 0]
        if said:
            raise NonFiniteError(said)
        if bool(found.any()):
            raise NonFiniteError(
                f"a gradient that process {int(found.argmax())} of {self._group.size} adds up is "
                "not finite"
            )

    @property
    def share(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Lets all processes have a few numbers of each."""
        return self._share

    def begin_updates(self) -> bool:
        """Send parameters as they are updated from now on, and receive those of the others."""
        self._is_gathering, self._stopped = True, False
        self._group.submit(self._gather_all, self._over)
        return True

    def updated(self, names: Collection[str]) -> None:
        """Note that this process has updated these parameters, or has nothing to update there."""
        native.trace_release(self._tokens[0])
        with self._condition:
            self._updated.update(names)
            self._condition.notify_all()

    def finish(self, check: Callable[[], None] = interrupts.check) -> frozenset[str]:
        """Wait until all processes have the new values of all parameters.

        Returns:
            Those that have come from another process.

        Raises:
            PeerError: if one has failed, or is gone; then parameters are of two steps.
        """
        if self._is_gathering:
            self.updated(self._params)
            self._wait(check)
            self._say("", check)
        self._is_over = True
        return self._names_now - self.mine(self._names_now)

    def fail(self, why: str, *, wait: bool = True) -> None:
        """Let the others hear that this process has failed, also in the middle of its updates."""
        if self.is_agreed and self._is_over:
            return
        if self.is_agreed:
            self._failed = True
            if not self._is_gathering:
                self.begin_updates()
            self.is_agreed = False
        super().fail(why, wait=wait)

    def _row(self, why: str, values: torch.Tensor | None = None) -> torch.Tensor:
        room = torch.zeros(2 + len(self._params), dtype=torch.float64)
        if values is not None:
            room[: len(values)] = values
        return torch.cat([super()._row(why), room.view(torch.uint8)])

    def _share(self, values: torch.Tensor) -> torch.Tensor:
        """Return the numbers of all processes.

        Args:
            values: float64 of shape ``(n,)``, at most two more than there are parameters.

        Returns:
            float64 of shape ``(size, n)``.
        """
        rows = self._said(self._row("", values), interrupts.check)
        start = rows.shape[1] - 8 * (2 + len(self._params))
        return rows[:, start:].contiguous().view(torch.float64)[:, : len(values)]

    def _what_is_left(self) -> str:
        if not self._is_gathering:
            return super()._what_is_left()
        return "It was in the middle of the updates: go back to a checkpoint"

    # On the thread of the group

    def _swap(self, chunk: Chunk | OwnedChunk, failed: bool) -> bool:
        """Add up this process's own gradients of a chunk; return whether no process has failed."""
        assert isinstance(chunk, OwnedChunk)
        group, size = self._group, self._group.size
        counts = [MARK_NBYTES + chunk.nbytes_of(rank) for rank in range(size)]
        own = counts[group.rank]
        rows = self._memory("sent", sum(counts))
        found = self._memory("found", size * own)
        for part, row in zip(chunk.parts, torch.split(rows, counts), strict=True):
            row[:MARK_NBYTES] = int(failed)
            if not failed:
                self._load(part, row[MARK_NBYTES:].view(chunk.dtype))
        group.swap_uneven(rows, counts, found, [own] * size)
        parts = found.view(size, own)
        if bool(parts[:, 0].any()):
            return False
        total = self._mean([part[MARK_NBYTES:].view(chunk.dtype) for part in parts])
        self._store(chunk.parts[group.rank], total)
        return True

    def _gather_all(self) -> None:
        try:
            self._group.after = "Some parameters are of this step, others of the step before"
            for chunk in (whole.only(self._names_now) for whole in self._owned):
                needed = {segment.name for segment in chunk.parts[self._group.rank]}
                with self._condition:
                    while not self._failed and not needed.issubset(self._updated):
                        self._condition.wait()
                    failed = self._failed
                native.trace_acquire(self._tokens[0])
                if not self._gather(chunk, failed):
                    return
            self._group.after = WHOLE
        except BaseException as error:
            self._ended = text_of(error)

    def _gather(self, chunk: OwnedChunk, failed: bool) -> bool:
        """Let all have the new values of a chunk; return whether no process has failed."""
        group, size = self._group, self._group.size
        counts = [MARK_NBYTES + chunk.nbytes_of(rank) for rank in range(size)]
        own = counts[group.rank]
        rows = self._memory("sent", size * own).view(size, own)
        found = self._memory("found", sum(counts))
        rows[0, :MARK_NBYTES] = int(failed)
        if not failed:
            own_values = rows[0, MARK_NBYTES:].view(chunk.dtype)
            self._copy(chunk.parts[group.rank], own_values, write=False)
        rows[1:] = rows[0]
        group.swap_uneven(rows.view(-1), [own] * size, found, counts)
        news = torch.split(found, counts)
        if any(bool(row[0]) for row in news):
            return False
        for rank, (part, row) in enumerate(zip(chunk.parts, news, strict=True)):
            if rank != group.rank:
                self._copy(part, row[MARK_NBYTES:].view(chunk.dtype), write=True)
                note_changes(self._params[segment.name] for segment in part)
        return True

    def _copy(self, part: Sequence[Segment], flat: torch.Tensor, *, write: bool) -> None:
        """Copy parameters to a row, or from one."""
        start = 0
        for segment in part:
            stop = start + segment.stop - segment.start
            # Parameter.detach takes note of whoever may write unseen.
            param = torch.Tensor.detach(self._params[segment.name])
            place = in_memory_order(param)[segment.start : segment.stop]
            native.trace_host_access(f"the values of {segment.name}", place, write=write)
            if write:
                place.copy_(flat[start:stop])
            else:
                flat[start:stop] = place
            start = stop
