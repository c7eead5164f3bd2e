"""Links: what plans are made with, beside what a copy alone takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gpu_check.steps import Note
from harmony.profiling.server import measure_machine
from harmony.runtime.device import DeviceContext

ROUNDS = 7
OFF = 0.2
"""What a measured link may be off by from a plain copy."""


def run(note: Note, small: bool) -> bool:
    """Note bytes per second of each GPU's links; False if Harmony's are off by a fifth."""
    nbytes = (1 << 20) if small else (256 << 20)
    count = torch.cuda.device_count()
    machine = measure_machine([DeviceContext(torch.device("cuda", i)) for i in range(count)])
    note(
        what="the host",
        cores=machine.host.num_cores,
        memory_gb_per_s=machine.host.memory_bytes_per_s / 1e9,
        peer_links=machine.peer_links,
        switches=[str(switch) for switch in machine.switches],
    )
    good = True
    for number, device in enumerate(machine.devices):
        up, down = _to_and_from_host(number, nbytes)
        peers = [_between(number, other, nbytes) for other in range(count) if other != number]
        off = max(abs(device.h2d_bytes_per_s / up - 1), abs(device.d2h_bytes_per_s / down - 1))
        good &= small or off <= OFF
        note(
            what=f"GPU {number}, GB/s",
            h2d=device.h2d_bytes_per_s / 1e9,
            h2d_of_a_copy=up / 1e9,
            d2h=device.d2h_bytes_per_s / 1e9,
            d2h_of_a_copy=down / 1e9,
            peer=device.p2p_bytes_per_s / 1e9,
            peer_of_copies=[rate / 1e9 for rate in peers],
        )
    return good


def _to_and_from_host(number: int, nbytes: int) -> tuple[float, float]:
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{number}")
    up = _rate(lambda: there.copy_(host, non_blocking=True), number, nbytes)
    down = _rate(lambda: host.copy_(there, non_blocking=True), number, nbytes)
    return up, down


def _between(number: int, other: int, nbytes: int) -> float:
    here = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{number}")
    there = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{other}")
    return _rate(lambda: there.copy_(here, non_blocking=True), number, nbytes, other)


def _rate(copy: Callable[[], object], number: int, nbytes: int, other: int | None = None) -> float:
    """Bytes per second, by the host's clock around a copy that is waited for."""
    taken = []
    for _ in range(ROUNDS + 2):
        for device in {number, number if other is None else other}:
            torch.cuda.synchronize(device)
        start_s = time.perf_counter()
        copy()
        for device in {number, number if other is None else other}:
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start_s)
    return nbytes / statistics.median(taken[2:])
