"""Measures the server: links alone and together, host memory, cores.

Everything takes a few copies of some megabytes. What is asked of a link alone says how fast it
is; all links at once, and then two by two, say which of them go through something narrower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import torch

from harmony.core.machine import Device, Host, Machine, Switch
from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError
from harmony.runtime import native
from harmony.runtime.device import DeviceContext, streams_restored
from harmony.runtime.host.limits import available_host_nbytes
from harmony.runtime.host.pinned_memory import HostBuffer

_LINK_SAMPLE_NBYTES = 16 * 2**20
_ADD_SAMPLE = 1 << 20
_MEMORY_SAMPLE_NBYTES = 32 * 2**20
_MAX_MEMORY_THREADS = 16
_CONTENTION_WIDTH = 64
_CONTENTION_NBYTES = 8 * 2**20
_CONTENTION_PRODUCTS = 20
_LARGER_THAN_CACHES_NBYTES = 256 * 2**20
_COPIES = 4
_REPEATS = 3
_ENOUGH_S = 0.2
"""A measurement that took this long is not repeated."""

_SHARED = 0.85
"""Links that together carry less than this part of what each carries alone share something."""


def measure_machine(
    contexts: Sequence[DeviceContext],
    memory_nbytes: int | None = None,
    host_memory_nbytes: int | None = None,
) -> Machine:
    """Measure the links of these devices and the memory of the host.

    Args:
        memory_nbytes: what Harmony may use of each device; all of it by default.
        host_memory_nbytes: what it may use of the host; what is free by default.
    """
    with streams_restored(contexts):
        devices = _measure_devices(contexts, memory_nbytes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        num_cores = cores or os.cpu_count() or 1
        host_nbytes = host_memory_nbytes or available_host_nbytes()
        is_virtual = native.is_virtual(contexts[0].device)
        add = _host_add_rate(cold=not is_virtual)
        if is_virtual:
            # Each virtual GPU has links of its own by construction, and what its copies and
            # kernels take of the host is in `cpu_share`.
            share = _measure_contention(contexts, num_cores)
            return Machine(devices, Host(host_nbytes, add, num_cores), share)
        memory = memory_rate(num_cores)
        host = Host(host_nbytes, add, num_cores, memory)
        own = native.have_own_links([context.device for context in contexts])
        return Machine(
            devices,
            host,
            switches=_measure_switches(contexts, devices),
            peer_links="direct" if own else "host",
        )


def usable_nbytes(context: DeviceContext, memory_nbytes: int | None = None) -> int:
    """Bytes of a device that plans may use now: what is free, at most what was asked for.

    Raises:
        DoesNotFitError: if nothing is left of a real GPU.
    """
    device = context.device
    free, total = native.memory_info(device)
    if native.is_virtual(device):
        return free if memory_nbytes is None else min(memory_nbytes, total)
    free += native.cached_nbytes(device)
    usable = free - native.reserve_nbytes(device)
    if memory_nbytes is not None:
        usable = min(memory_nbytes, free)
    if usable > 0:
        return usable
    mine = int(torch.accelerator.memory_allocated(device))
    raise DoesNotFitError(
        f"{device} has {format_bytes(max(free, 0))} of {format_bytes(total)} free: tensors of "
        f"this process hold {format_bytes(mine)}, other processes and what CUDA itself needs the "
        "rest. Let go of what is on it, or choose another GPU (devices=, CUDA_VISIBLE_DEVICES)"
    )


def find_switches(
    alone: Sequence[tuple[float, float]],
    pairs: Mapping[tuple[int, int], tuple[float, float]],
    everything: tuple[float, float],
    together: Callable[[Sequence[int]], tuple[float, float]],
) -> tuple[Switch, ...]:
    """Say which devices share a link to the host, from bytes per second in and out.

    Devices of which two slow each other down are behind one switch; where any two do, it is one
    for all. If all at once get less than the switches and the free links have, there is one more
    above them.

    Args:
        alone: per device, what it gets alone.
        pairs: what two devices get together, the sum of both.
        everything: what all get together.
        together: measures what some devices get together.
    """
    groups = _groups(len(alone), [pair for pair, got in pairs.items() if _drops(alone, pair, got)])
    switches = [
        Switch(tuple(group), *(everything if len(group) == len(alone) else together(group)))
        for group in groups
    ]
    free = [device for device in range(len(alone)) if not any(device in g for g in groups)]
    expected = [
        sum(alone[device][way] for device in free)
        + sum((s.h2d_bytes_per_s, s.d2h_bytes_per_s)[way] for s in switches)
        for way in (0, 1)
    ]
    if any(everything[way] < _SHARED * expected[way] for way in (0, 1)):
        switches.append(Switch(tuple(range(len(alone))), *everything))
    return tuple(switches)


def _drops(
    alone: Sequence[tuple[float, float]], pair: tuple[int, int], got: tuple[float, float]
) -> bool:
    a, b = pair
    return any(got[way] < _SHARED * (alone[a][way] + alone[b][way]) for way in (0, 1))


def _groups(count: int, edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups of numbers that the pairs connect, each sorted."""
    group = list(range(count))
    for a, b in edges:
        old, new = max(group[a], group[b]), min(group[a], group[b])
        group = [new if member == old else member for member in group]
    found = [[i for i in range(count) if group[i] == name] for name in sorted(set(group))]
    return [members for members in found if len(members) > 1]


def _measure_devices(
    contexts: Sequence[DeviceContext], memory_nbytes: int | None
) -> tuple[Device, ...]:
    devices = []
    for index, context in enumerate(contexts):
        peer = contexts[(index + 1) % len(contexts)]
        usable = usable_nbytes(context, memory_nbytes)
        rates = _measure_links(context, peer, _sample_nbytes(usable))
        devices.append(Device(str(context.device), usable, *rates))
    return tuple(devices)


def _sample_nbytes(usable: int) -> int:
    return max(1, min(_LINK_SAMPLE_NBYTES, usable // 4))


def _measure_links(
    context: DeviceContext, peer: DeviceContext, nbytes: int
) -> tuple[float, float, float]:
    """Bytes per second host to device, device to host, and to a peer."""
    host = HostBuffer(nbytes, context.device, "the measurement of the links").tensor
    context.enter([peer.device])
    context.use("compute")
    here = torch.empty(nbytes, dtype=torch.uint8, device=context.device)
    there = torch.empty(nbytes, dtype=torch.uint8, device=peer.device)
    context.synchronize()

    def rate(stream: str, target: torch.Tensor, source: torch.Tensor) -> float:
        def once() -> float:
            begin = context.new_event(timing=True)
            end = context.new_event(timing=True)
            queue = context.use(stream)
            queue.record_event(begin)
            target.copy_(source, non_blocking=True)
            queue.record_event(end)
            queue.synchronize()
            return begin.elapsed_time(end) / 1e3

        cold = not native.is_virtual(context.device)
        return nbytes / max(best_of(once, cold=cold), 1e-9)

    return rate("h2d", here, host), rate("d2h", host, here), rate("p2p", there, here)


def _measure_switches(
    contexts: Sequence[DeviceContext], devices: Sequence[Device]
) -> tuple[Switch, ...]:
    """Copy on all devices at once; where that is slower than alone, find out which share."""
    if len(contexts) < 2:
        return ()
    alone = [(device.h2d_bytes_per_s, device.d2h_bytes_per_s) for device in devices]
    size = _sample_nbytes(min(device.memory_nbytes for device in devices))
    samples = _Samples(contexts, size)
    everything = samples.together(range(len(contexts)))
    if all(everything[way] >= _SHARED * sum(rates[way] for rates in alone) for way in (0, 1)):
        return ()
    pairs = {pair: samples.together(pair) for pair in combinations(range(len(contexts)), 2)}
    return find_switches(alone, pairs, everything, samples.together)


class _Samples:
    """Memory on the host and on every device to copy between."""

    def __init__(self, contexts: Sequence[DeviceContext], nbytes: int) -> None:
        self._contexts = contexts
        self._nbytes = nbytes
        self._host = []
        self._device = []
        for context in contexts:
            what = "the measurement of the links"
            self._host.append(HostBuffer(nbytes, context.device, what).tensor)
            context.enter()
            context.use("compute")
            self._device.append(torch.empty(nbytes, dtype=torch.uint8, device=context.device))
            context.synchronize()

    def together(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Bytes per second in, and out, of some devices that copy at the same time."""
        return self._rate(chosen, "h2d"), self._rate(chosen, "d2h")

    def _rate(self, chosen: Sequence[int], stream: str) -> float:
        """The sum of the rates that each sees for itself, while the others copy as well."""
        pairs = []
        for _ in range(_COPIES):
            # In turns, so that the last device begins when the first has not done much yet.
            for index in chosen:
                context = self._contexts[index]
                context.enter()
                queue = context.use(stream)
                begin = context.new_event(timing=True)
                end = context.new_event(timing=True)
                target, source = self._device[index], self._host[index]
                if stream == "d2h":
                    target, source = source, target
                queue.record_event(begin)
                target.copy_(source, non_blocking=True)
                queue.record_event(end)
                pairs.append((index, begin, end))
        for index in chosen:
            self._contexts[index].synchronize()
        # The first copy of a device may have been alone, the last one too: the middle ones count.
        inner = pairs[len(chosen) : -len(chosen)]
        seconds = [begin.elapsed_time(end) / 1e3 for _, begin, end in inner]
        return sum(self._nbytes / max(s, 1e-9) for s in seconds) * len(chosen) / len(inner)


def memory_rate(num_cores: int) -> float:
    """Bytes per second, reads and writes together, that the host's memory carries."""
    threads = min(num_cores, _MAX_MEMORY_THREADS)
    count = _MEMORY_SAMPLE_NBYTES // 4
    pairs = [(torch.zeros(count), torch.ones(count)) for _ in range(threads)]

    # Threads of our own: how many torch uses for one copy is the user's choice.
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            for done in [pool.submit(target.copy_, source) for target, source in pairs]:
                done.result()

        seconds = best_of(timed(copy_all))
    return 2 * threads * _MEMORY_SAMPLE_NBYTES / max(seconds, 1e-9)


def _host_add_rate(*, cold: bool) -> float:
    """Gradient bytes per second that the host adds to others, from memory if ``cold``."""
    a, b = torch.zeros(_ADD_SAMPLE), torch.zeros(_ADD_SAMPLE)
    once = timed(lambda: a.add_(b))
    return a.nbytes / max(best_of(out_of_cache(once) if cold else once), 1e-9)


def _measure_contention(contexts: Sequence[DeviceContext], num_cores: int) -> float:
    """Cores' worth of work that a virtual GPU wants, by how all of them slow each other down."""

    width = _CONTENTION_WIDTH
    memory = min(native.memory_info(context.device)[0] for context in contexts)
    columns = max(width, min(_CONTENTION_NBYTES, memory // 8) // (4 * width))

    def seconds(chosen: Sequence[DeviceContext]) -> float:
        pairs = []
        for context in chosen:
            context.enter()
            stream = context.use("compute")
            # As in a layer: few rows times weights too many for a core's own cache.
            w = torch.ones(width, columns, device=context.device)
            x = torch.ones(width, width, device=context.device)
            pair = context.new_event(timing=True), context.new_event(timing=True)
            stream.record_event(pair[0])
            for _ in range(_CONTENTION_PRODUCTS):
                torch.mm(x, w)
            stream.record_event(pair[1])
            pairs.append(pair)
        for context in chosen:
            context.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / len(pairs)

    if len(contexts) < num_cores:
        return 1.0
    seconds(contexts[:1])  # warm up
    slowdown = seconds(contexts) / max(seconds(contexts[:1]), 1e-9)
    return max(1.0, slowdown * num_cores / len(contexts))


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs something and returns how many seconds it took."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def out_of_cache(once: Callable[[], float]) -> Callable[[], float]:
    """Let each try find nothing in the caches, as an update of all parameters in turn does."""
    other = torch.empty(_LARGER_THAN_CACHES_NBYTES, dtype=torch.uint8)

    def cold() -> float:
        other.add_(1)
        return once()

    return cold


def best_of(once: Callable[[], float], *, cold: bool = False) -> float:
    """Shortest of a few tries after one that warms up; a long one is believed at once.

    Args:
        cold: the first try loads code and raises clocks, as on a real GPU: it says nothing.
    """
    first = once()
    if first > _ENOUGH_S:
        return once() if cold else first
    return min(once() for _ in range(_REPEATS))
