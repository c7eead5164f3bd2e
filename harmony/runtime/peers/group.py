"""The processes that train one model, and the few collective operations that they need.

All of it is bytes on the CPU, by gloo, in a group of its own: whatever else the program sends in
the group that it gave cannot get in between. Nothing here is reduced by gloo, whose sums follow
its own order: rows are only moved, and whoever has them adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from harmony.errors import ConfigError, PeerError, text_of
from harmony.runtime import interrupts, native
from harmony.runtime.exec.workers import Countdown, Worker

T = TypeVar("T")

WHOLE = "What this process has is of one step"
"""What is left where others are lost while none of them changes anything."""


class PeerGroup:
    """The processes of one model, of which this is number ``rank`` of ``size``.

    Collective operations run on a thread of their own, one after the other, in the order in which
    they were submitted; so all processes have to submit the same ones.

    Attributes:
        sent_nbytes: bytes that this process has handed over for others so far.
        scratch: memory that the exchange of gradients uses again and again.
        after: what this process has, should the others be lost now.
    """

    def __init__(self, process_group: Any) -> None:
        """Make a group of the same processes; all of them have to do so.

        Raises:
            ConfigError: if it is no group, or this process is not in it.
        """
        ranks = _ranks_of(process_group)
        self.rank, self.size = dist.get_rank(process_group), len(ranks)
        self.sent_nbytes = 0
        self.scratch: dict[str, torch.Tensor] = {}
        self.after = WHOLE
        self._lost: str | None = None
        self._worker = Worker("harmony-peers", awaited=False)  # others may never come
        self._group: Any = _connected(ranks, _timeout_of(process_group))

    # On the thread of the group

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, which are equally long, in the order of their ranks.

        Args:
            row: uint8 of shape ``(n,)``.

        Returns:
            uint8 of shape ``(size, n)``.
        """
        found = torch.empty(self.size, row.numel(), dtype=torch.uint8)
        self._wait(lambda group: group.allgather([list(found.unbind())], [row]))
        self.sent_nbytes += (self.size - 1) * row.numel()
        return found

    def swap(self, rows: torch.Tensor, found: torch.Tensor) -> None:
        """Send row ``i`` to process ``i``, and receive from each process its row for this one.

        Args:
            rows, found: uint8 of shape ``(size, n)``.
        """
        self._wait(lambda group: group.alltoall_base(found.view(-1), rows.view(-1), [], []))
        self.sent_nbytes += (self.size - 1) * rows.shape[1]

    def collect(self, row: torch.Tensor, found: torch.Tensor) -> None:
        """Do what `gather` does, into memory that there is: uint8 of shape ``(size, n)``."""
        self._wait(lambda group: group.allgather([list(found.unbind())], [row]))
        self.sent_nbytes += (self.size - 1) * row.numel()

    def swap_uneven(
        self,
        rows: torch.Tensor,
        sent: Sequence[int],
        found: torch.Tensor,
        received: Sequence[int],
    ) -> None:
        """Do what `swap` does, with rows of different lengths that lie one behind the other.

        Args:
            rows, found: uint8, flat.
            sent, received: bytes to and from each process.
        """
        given = list(received), list(sent)
        self._wait(lambda group: group.alltoall_base(found, rows, *given))
        self.sent_nbytes += sum(sent) - sent[self.rank]

    def send(self, row: torch.Tensor, rank: int) -> None:
        """Send ``row``, uint8, to a process that asks for as many bytes by `receive`."""
        self._wait(lambda group: group.send([row], rank, 0))
        self.sent_nbytes += row.numel()

    def receive(self, nbytes: int, rank: int) -> torch.Tensor:
        """Return what a process gives to `send`: uint8 of shape ``(nbytes,)``."""
        row = torch.empty(nbytes, dtype=torch.uint8)
        self._wait(lambda group: group.recv([row], rank, 0))
        return row

    def from_first(self, row: torch.Tensor) -> None:
        """Let ``row``, uint8, be in all processes what it is in process 0."""
        self._wait(lambda group: group.broadcast(row, 0))
        if self.rank == 0:
            self.sent_nbytes += (self.size - 1) * row.numel()

    def _wait(self, begin: Callable[[Any], Any]) -> None:
        self.check()
        try:
            begin(self._group).wait()
        except RuntimeError as error:
            said = text_of(error).partition("\n")[0]
            said = said.rpartition("] ")[2] if said.startswith("[") and "] " in said else said
            self._lost = said.partition(". This is typically")[0][:300]
            self.check()

    # From any other thread

    def same_number(self, number: int) -> int:
        """Return what ``number``, of 64 bits, is in process 0."""
        held = torch.tensor([number])
        self.run(lambda: self.from_first(held.view(torch.uint8)))
        return int(held)

    def submit(self, job: Callable[[], object], done: Callable[[], None]) -> None:
        """Run ``job``, which must not raise, behind what was submitted before."""
        self._worker.submit(job, done)

    def run(self, what: Callable[[], T], check: Callable[[], None] = interrupts.check) -> T:
        """Run collective operations, and wait for what they return.

        Args:
            check: called now and then meanwhile; may raise, and then nobody waits any more.

        Raises:
            PeerError: if another process is gone, or does not come.
        """
        came: list[T] = []
        failed: list[BaseException] = []
        given, taken = native.new_tokens(2)

        def job() -> None:
            native.trace_acquire(given)
            try:
                came.append(what())
            except BaseException as error:
                failed.append(error)
            native.trace_release(taken)

        countdown = Countdown(1)
        native.trace_release(given)
        self.submit(job, countdown.done)
        countdown.wait(check)
        native.trace_acquire(taken)
        if failed:
            raise failed.pop()
        return came.pop()

    def check(self) -> None:
        """Refuse to go on without the others.

        Raises:
            PeerError: saying how they were lost.
        """
        if self._lost is not None:
            raise PeerError(
                f"process {self.rank} of {self.size} has lost the others ({self._lost}): one of "
                "them has ended, or did not come to the same step within the timeout of the "
                f"process group. {self.after}. Start all of them again, from a checkpoint"
            )

    def close(self) -> None:
        """Take part in nothing any more; the others hear of it as the connections close."""
        self._lost = self._lost or "this model has been closed"
        self._worker.end()
        group, self._group = self._group, None
        if group is not None:
            with suppress(Exception):  # the program may have destroyed it, as all others
                dist.destroy_process_group(group)


def peers_of(process_group: Any) -> PeerGroup | None:
    """Return the processes of a group; None without one, and for a group of this process alone.

    Raises:
        ConfigError: as `PeerGroup`.
    """
    if process_group is None or len(_ranks_of(process_group)) == 1:
        return None
    return PeerGroup(process_group)


def _ranks_of(process_group: Any) -> list[int]:
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "process_group= before torch.distributed.init_process_group(): call it first, with "
            'backend "gloo" or "cpu:gloo,cuda:nccl"'
        )
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ConfigError(
            "process_group= is a group that this process is not in: make the model in its members"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise ConfigError(
            f"process_group={str(process_group)[:60]!r}: a group of torch.distributed, as "
            "torch.distributed.group.WORLD"
        )
    return list(dist.get_process_group_ranks(process_group))


def _connected(ranks: list[int], timeout: timedelta | None) -> Any:
    """Return connections between these processes that nobody else has, in the order of ranks."""
    if len(ranks) == dist.get_world_size():
        return dist.new_group(ranks, timeout=timeout, backend="gloo")
    # PyTorch names a group of some of the processes by their ranks, if the others do not have to
    # come: the second one would find the addresses of the first. Here each has a number more.
    c10d, rank = dist.distributed_c10d, dist.get_rank()
    store = c10d._get_default_store()
    those = "-".join(map(str, ranks))
    number = store.add(f"harmony/{those}/made by {rank}", 1)
    own = c10d.PrefixStore(f"harmony/{those}/{number}", store)
    wait = timeout or dist.default_pg_timeout
    return dist.ProcessGroupGloo(own, ranks.index(rank), len(ranks), wait)


def _timeout_of(process_group: Any) -> timedelta | None:
    """How long the program's own group waits; None, PyTorch's default, where that is not known."""
    for device in ("cpu", "cuda"):
        with suppress(RuntimeError, AttributeError):
            found = process_group._get_backend(torch.device(device)).options._timeout
            if isinstance(found, timedelta):
                return found
    return None
