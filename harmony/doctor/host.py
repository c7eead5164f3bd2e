"""Host memory: how much, how fast, and what limits it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

from harmony.core.units import format_bytes, format_rate
from harmony.doctor.findings import Finding, counted, ok, warning
from harmony.runtime.host.limits import available_host_nbytes, group_limits, total_host_nbytes

NODES = Path("/sys/devices/system/node")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_SCARCE = 0.1
"""The part of the memory that should at least be free."""


def look_at_cores() -> Iterator[Finding]:
    """Cores that this process may use, and the nodes of memory that they belong to."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores = os.cpu_count() or 1
    yield ok("cores", f"{usable or cores} of {cores} usable", usable=usable or cores, cores=cores)
    nodes = sorted(NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    if not nodes:
        yield ok("NUMA", "the system does not say", nodes=0)
        return
    parts = [f"{path.name}: cores {(path / 'cpulist').read_text().strip()}" for path in nodes]
    yield ok("NUMA", f"{counted(len(nodes), 'node')}; {'; '.join(parts)}", nodes=parts)


def look_at_memory() -> Iterator[Finding]:
    """Memory that there is, that is free, and that the process may take."""
    memory, free, total = psutil.virtual_memory(), available_host_nbytes(), total_host_nbytes()
    figures = {"free_nbytes": free, "total_nbytes": total, "machine_nbytes": int(memory.total)}
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    if free < _SCARCE * total:
        remedy = "weights, gradients and optimizer state live there: end what holds it"
        yield warning("host memory", text, remedy, **figures)
    else:
        yield ok("host memory", text, **figures)
    found = [group for group in group_limits() if group.limit < memory.total]
    if not found:
        yield ok("cgroup", "no limit below the machine's memory")
    for group in found:
        left = group.limit - group.used
        text = (
            f"version {group.version}: {format_bytes(group.used)} of {format_bytes(group.limit)} "
            f"used ({group.folder})"
        )
        figures = {"version": group.version, "limit": group.limit, "used": group.used}
        if left < _SCARCE * group.limit:
            remedy = "raise the limit (docker run --memory, systemd MemoryMax=), or end what holds"
            yield warning("cgroup", text, f"{remedy} it", **figures)
        else:
            yield ok("cgroup", text, **figures)


def look_at_limits() -> Iterator[Finding]:
    """Limits of locking and promising memory, and huge pages."""
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else format_bytes(limit)
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    yield ok("memlock", f"{soft} (at most {hard})", soft=soft, hard=hard)
    mode = OVERCOMMIT.read_text().strip() if OVERCOMMIT.exists() else ""
    if mode == "2":
        remedy = "sysctl vm.overcommit_memory=0: large maps are refused though memory is free"
        yield warning("overcommit", "the system promises no more memory than it has", remedy)
    chosen = HUGE.read_text().partition("[")[2].partition("]")[0] if HUGE.exists() else ""
    reserved = _reserved_huge_nbytes()
    text = f"transparent: {chosen or 'unknown'}; reserved: {format_bytes(reserved)}"
    if reserved > _SCARCE * psutil.virtual_memory().total:
        remedy = "sysctl vm.nr_hugepages=0: no tensor can be in pages that are reserved"
        yield warning("huge pages", text, remedy, transparent=chosen, reserved_nbytes=reserved)
    else:
        yield ok("huge pages", text, transparent=chosen, reserved_nbytes=reserved)


def _reserved_huge_nbytes() -> int:
    """Bytes that are set aside for huge pages."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    words = found.get("Hugetlb", "0 kB").split()
    return int(words[0]) * 1024


def look_at_memory_rate() -> Iterator[Finding]:
    """Bytes per second that the host's memory carries, in copies of some megabytes."""
    from harmony.profiling.server import memory_rate

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    rate = memory_rate(cores)
    yield ok("memory rate", f"{format_rate(rate)}, reads and writes together", bytes_per_s=rate)
