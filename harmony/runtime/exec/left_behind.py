"""What a forward has left for its backward in a loop of the caller's own, while that is to come.

It is never needed: a backward that does not find it recomputes. So it is there for one forward at
a time, the last one, and gives way to whatever else runs: another forward, inference, other models
on the same devices. What is counted for a plan then holds whatever the caller's loop does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch

from harmony.planner.ir.tasks import TensorRef
from harmony.runtime.exec.task_issue import SavedForwards
from harmony.runtime.host.pinned_memory import HostBuffer

# An object that dies may let go anywhere, also in a thread that is at it.
_LOCK = threading.RLock()
_WAITING: weakref.WeakSet[LeftBehind] = weakref.WeakSet()
"""Where something waits on devices that may give way."""


class LeftBehind:
    """What waits on the devices, and on the host, of one executor.

    Attributes:
        on_devices: per device; of what waits on the host, what autograd knows of it.
        on_host: memory for that; it is kept for the next forward.
        taken_nbytes: per device, what the last forward has not given back.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.on_devices: list[SavedForwards] = [{} for _ in devices]
        self.on_host: dict[TensorRef, HostBuffer] = {}
        self.taken_nbytes = [0] * len(devices)
        self._devices = frozenset(devices)
        self._key: object = None

    def keep_for(self, key: object) -> None:
        """Let it wait for the backward that asks with this key."""
        with _LOCK:
            self._key = key
            _WAITING.add(self)

    def take(self, key: object) -> bool:
        """Whether it has waited for this backward; if so nobody else lets go of it."""
        with _LOCK:
            is_there = self._key is not None and self._key is key
            if is_there:
                self._key = None
                _WAITING.discard(self)
            return is_there

    def let_go_of(self, key: object) -> None:
        """Let go if it waits for this backward, which nobody can ask for any more."""
        with _LOCK:
            if self._key is key:
                self.let_go()

    def let_go(self) -> None:
        """Give the memory on the devices back; only while its executor runs nothing."""
        with _LOCK:
            self._key = None
            _WAITING.discard(self)
            for saved in self.on_devices:
                saved.clear()

    def forget(self) -> None:
        """Let go, and give the memory on the host back, too: plans are others now."""
        self.let_go()
        self.on_host.clear()

    def make_room(self) -> None:
        """Let others that wait on the same devices go."""
        if not _WAITING:
            return
        with _LOCK:  # what waits is in no run
            for other in list(_WAITING):
                if other is not self and other._devices & self._devices:
                    other.let_go()

    def nbytes(self) -> list[int]:
        """Bytes that are on each device."""
        pairs = zip(self.taken_nbytes, self.on_devices, strict=True)
        return [nbytes if saved else 0 for nbytes, saved in pairs]


def let_all_go() -> None:
    """Let everything go that waits on any device."""
    with _LOCK:
        for each in list(_WAITING):
            each.let_go()
