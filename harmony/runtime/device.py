"""Real and virtual GPUs behind PyTorch's device-generic interface: streams, events, random state.

Everything here is `torch.Stream`, `torch.Event` and `torch.accelerator`; the few calls that only
CUDA or only the virtual GPU has are in `harmony.runtime.native`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from harmony.planner.ir.schedule import DEVICE_STREAMS
from harmony.runtime import native

_MAX_ERRORS = 8
"""A stream reports one error a time; after so many it is the device that fails."""


_FORKED = 0x40
"""Of the flags of a process: it was forked and has begun no program since (linux/sched.h)."""


@functools.cache
def _settle_thread_pool() -> None:
    """Let the calling thread make PyTorch's pool of threads anew, in a process that was forked.

    Else the first thread that asks for it does, and the threads of autograd, one a device, ask at
    the same time: one finds none, and PyTorch ends the process (ATen/ParallelOpenMP.cpp, "Invalid
    thread pool!").
    """
    with suppress(OSError, ValueError, IndexError):  # only Linux tells
        flags = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]
        if int(flags) & _FORKED:
            torch.set_num_threads(torch.get_num_threads())


class DeviceContext:
    """One device and the streams that a schedule names, owned by one host thread.

    Attributes:
        streams: stream of each name in ``DEVICE_STREAMS``. None is the default stream, on which
            the user's own work on the device is.
        current: the name of the one that is current in the thread that issues; "" if none is.
    """

    def __init__(self, device: torch.device) -> None:
        _settle_thread_pool()
        self.device = device
        self.module = torch.get_device_module(device)
        with torch.accelerator.device_index(device.index):  # else it makes a context on GPU 0, too
            self.streams = {name: torch.Stream(device=device) for name in DEVICE_STREAMS}
        self._landing: dict[torch.device, torch.Stream] = {}
        self.current = ""

    def enter(self, peers: Iterable[torch.device] = ()) -> None:
        """Make this device current in the calling thread, which will copy to ``peers``."""
        # A peer copy fences the destination's current stream of the thread that issues it. The
        # landing streams never have work of their own, so that fence makes nobody wait.
        for peer in peers:
            if peer != self.device:
                if peer not in self._landing:  # a device has few: each is made once
                    self._landing[peer] = torch.Stream(device=peer)
                torch.accelerator.set_stream(self._landing[peer])
        torch.accelerator.set_device_index(self.device.index)
        self.current = ""

    def use(self, stream: str) -> torch.Stream:
        """Make one of the streams current in the calling thread and return it."""
        chosen = self.streams[stream]
        if self.current != stream:
            torch.accelerator.set_stream(chosen)
            self.current = stream
        return chosen

    def new_event(self, *, timing: bool = False) -> torch.Event:
        """Return an event of this device, with a time stamp if ``timing``."""
        return torch.Event(device=self.device, enable_timing=timing)

    def synchronize(self) -> None:
        """Wait until every stream of the schedule has run dry; raises what a kernel raised."""
        for stream in self.streams.values():
            stream.synchronize()

    def wait_for_caller(self) -> None:
        """Wait for what the calling thread has enqueued here itself, on its current stream."""
        stream = torch.accelerator.current_stream(self.device)
        if not stream.query():
            stream.synchronize()

    def drain(self) -> None:
        """Wait for what a failed step had issued; its further errors are ignored."""
        for stream in self.streams.values():
            for _ in range(_MAX_ERRORS):
                try:
                    stream.synchronize()
                except Exception:
                    continue
                break

    def seeded_state(self, seed: int) -> torch.Tensor:
        """Return the random state that ``torch.manual_seed(seed)`` gives this device."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(seed)
        return generator.get_state()

    def random_state(self) -> torch.Tensor:
        """Return the state of the device's default generator."""
        state: torch.Tensor = self.module.get_rng_state(self.device)
        return state

    def set_random_state(self, state: torch.Tensor) -> None:
        """Set the state of the device's default generator."""
        self.module.set_rng_state(state, self.device)

    def taken_nbytes(self) -> tuple[int, int]:
        """Bytes of tensors: the most since the peak was reset, and now."""
        stats = torch.accelerator.memory_stats(self.device)  # each question makes all of them
        peak, now = (f"allocated_bytes.all.{which}" for which in ("peak", "current"))
        return stats.get(peak, 0), stats.get(now, 0)  # before the first tensor there are none

    def free_nbytes(self) -> int:
        """Bytes that tensors could still have, what PyTorch's allocator keeps included."""
        return native.memory_info(self.device)[0] + native.cached_nbytes(self.device)

    def limit_nbytes(self) -> int:
        """Total bytes of memory of the device."""
        return int(native.memory_info(self.device)[1])


@contextmanager
def streams_restored(contexts: Sequence[DeviceContext]) -> Iterator[None]:
    """Leave the calling thread, which is the user's, with the device and streams it had."""
    # To set a device makes a context on it, some 500 MB: `device_index` goes back to the device
    # that was current without that, if nobody had used it yet.
    with torch.accelerator.device_index(contexts[0].device.index):
        streams = [torch.accelerator.current_stream(context.device) for context in contexts]
        try:
            yield
        finally:
            for stream in streams:
                torch.accelerator.set_stream(stream)


def available_devices() -> list[torch.device]:
    """Devices of the current accelerator, real or virtual; empty without one."""
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
