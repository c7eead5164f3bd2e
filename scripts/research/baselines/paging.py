"""Memory virtualisation of one GPU: tensors are paged in on access, the least recently used leave.

What systems for one GPU do (unified memory, large model support), and what the paper compares
Harmony with (PVLDB 15(11), 2022, section 2): each GPU swaps for itself, and nobody knows what will
be needed next. A task starts when all it touches is on the GPU; to make room the tensors that were
used longest ago are evicted, and written to the host if they have changed since they came.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.planner.ir.schedule import Op
from harmony.planner.predict.flows import Activities
from harmony.planner.predict.links import Links

Tensor = tuple[str, int, int]
"""Its kind, its layer or value, and its microbatch (-1 if it belongs to none)."""


@dataclass
class _Page:
    """A tensor on the GPU, and whether it has changed since it came."""

    nbytes: int
    dirty: bool = False


class Pager:
    """The memory of one GPU.

    Attributes:
        moved: bytes by link and kind of tensor.
        compute: the last task of the GPU, -1 before the first.
    """

    def __init__(
        self,
        activities: Activities,
        links: Links,
        device: int,
        on_host: Iterable[Tensor],
        *,
        always_writes: bool = False,
    ) -> None:
        """Begin with an empty GPU.

        Args:
            on_host: tensors that the host holds at the beginning.
            always_writes: whether what is evicted is written to the host even if the host has
                it, as in the paper's closed forms.
        """
        self.moved: dict[tuple[str, str], int] = {}
        self.compute = -1
        self._activities = activities
        self._links = links
        self._device = device
        self._limit = links.machine.devices[device].memory_nbytes
        self._always = always_writes
        self._pages: OrderedDict[Tensor, _Page] = OrderedDict()
        self._used = 0
        self._host: dict[Tensor, int] = dict.fromkeys(on_host, -1)

    def run(
        self,
        reads: Sequence[tuple[Tensor, int]],
        writes: Sequence[tuple[Tensor, int]],
        workspace: int,
        seconds: float,
        after: Sequence[int] = (),
    ) -> int:
        """Run a task when all that it touches is here; return its activity.

        Args:
            reads, writes: tensors and their bytes; what is read but is neither here nor on the
                host comes with ``after`` (from another GPU).
            workspace: bytes that the task takes beside them.

        Raises:
            DoesNotFitError: if the task alone needs more than the GPU has.
        """
        touched = dict([*reads, *writes])
        needed = sum(touched.values()) + workspace
        if needed > self._limit:
            raise DoesNotFitError(
                f"one task needs {format_bytes(needed)}, the GPU has {format_bytes(self._limit)}."
                " Use a smaller microbatch"
            )
        missing = {tensor: n for tensor, n in touched.items() if tensor not in self._pages}
        evicted = self._make_room(sum(missing.values()) + workspace, touched)
        waits = [*after, *evicted]
        for tensor, nbytes in missing.items():
            self._pages[tensor] = _Page(nbytes)
            self._used += nbytes
            if tensor in self._host:
                waits.append(self._copy(Op.SWAP_IN, tensor, nbytes, evicted))
        units, path = self._links.compute_units(seconds)
        lane = ((self._device, "compute"),)
        done = self._activities.add(lane, waits, seconds=seconds, units=units, resources=path)
        for tensor in touched:
            self._pages.move_to_end(tensor)
        for tensor, _ in writes:
            self._pages[tensor].dirty = True
            self._host.pop(tensor, None)
        self.compute = done
        return done

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Forget tensors that nobody reads any more, here and on the host."""
        for tensor in tensors:
            page = self._pages.pop(tensor, None)
            self._used -= 0 if page is None else page.nbytes
            self._host.pop(tensor, None)

    def _make_room(self, nbytes: int, keep: Iterable[Tensor]) -> list[int]:
        """Evict until there is room; return the copies that have to be over by then."""
        copies = []
        pinned = set(keep)
        victims = (tensor for tensor in list(self._pages) if tensor not in pinned)
        while self._used + nbytes > self._limit:
            tensor = next(victims)  # all but the pinned ones fit, so there is one
            page = self._pages.pop(tensor)
            self._used -= page.nbytes
            if page.dirty or self._always or tensor not in self._host:
                copy = self._copy(Op.SWAP_OUT, tensor, page.nbytes, ())
                self._host[tensor] = copy
                copies.append(copy)
        return copies

    def _copy(self, op: Op, tensor: Tensor, nbytes: int, after: Sequence[int]) -> int:
        way = "h2d" if op is Op.SWAP_IN else "d2h"
        key = (way, tensor[0])
        self.moved[key] = self.moved.get(key, 0) + nbytes
        # On access: nothing moves before the task in front of this one is over. What is evicted
        # was touched last by it or by one before.
        waits = [*after, self.compute]
        if op is Op.SWAP_IN:
            waits.append(self._host[tensor])
        waits = [number for number in waits if number >= 0]
        path = self._links.path(op, self._device)
        lane = ((self._device, way),)
        return self._activities.add(lane, waits, units=nbytes, resources=path)
