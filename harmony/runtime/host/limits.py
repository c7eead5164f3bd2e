"""How much memory the host has, how much of it this process may still take, and giving it back."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available_host_nbytes() -> int:
    """Bytes of host memory that this process may still take: free memory, or the cgroup's rest."""
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(group.limit - group.used for group in group_limits())]))


def total_host_nbytes() -> int:
    """Bytes of host memory, or the cgroup's limit: the same in every run."""
    return min([int(psutil.virtual_memory().total), *(group.limit for group in group_limits())])


def give_back_freed() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc).

    It keeps what lies between other blocks, which can be all that a model took before its
    parameters moved to the arena: tensors of less than 32 MiB share one heap, since the first one
    of a size that is freed raises the size from which tensors get pages of their own.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # a system that has no such library
        return None
    return found


class GroupLimit(NamedTuple):
    """Bytes that a control group may take, and has taken.

    Attributes:
        version: of control groups, 1 or 2.
        folder: of the group.
    """

    version: int
    folder: Path
    limit: int
    used: int


def group_limits() -> Iterator[GroupLimit]:
    """Limit and use of the control groups that the process is in, as far as they can be read.

    Version 2 has one tree of groups, version 1 one for memory; a group is limited by those above
    it. In a container the tree begins at the container's own group, whatever the path says.
    """
    for version, controller, limit, used in (
        (2, "", "memory.max", "memory.current"),
        (1, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        tree = CGROUP / controller
        own = tree / _own_group(controller).lstrip("/")
        for group in (own, *own.parents):
            if group == tree.parent:
                break
            try:
                # Without a limit version 2 says "max", version 1 a number beyond any memory.
                found = int((group / limit).read_text(encoding="ascii"))
                taken = int((group / used).read_text(encoding="ascii"))
                yield GroupLimit(version, group, found, taken)
            except (OSError, ValueError):
                continue


def _own_group(controller: str) -> str:
    """Path of the process's group in the tree of a controller; "" stands for version 2."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and ".." not in path:
            return path
    return ""
