"""The folder of checkpoints and the caches: place, room, speed, owner."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from harmony.core.files import cache_folder
from harmony.core.units import format_bytes, format_rate
from harmony.doctor.findings import Finding, Status, counted, ok, warning

SAMPLE_NBYTES = 64 * 2**20
SAMPLE_S = 3.0
"""Bytes, and seconds, after which the trial of a disk ends."""

_CHUNK_NBYTES = 2**20
_PREFIX = ".harmony-doctor-"
_ELSEWHERE = "HARMONY_CACHE names another folder: else each run measures and builds again"
_MOST_FILES = 10_000
_VOLATILE = ("tmpfs", "ramfs")
_SLOW_BYTES_PER_S = 50e6


def look_at_checkpoint_folder(folder: Path, chosen: bool) -> Iterator[Finding]:
    """Room and speed of the disk below a folder, measured with one small file that is removed.

    Args:
        chosen: whether somebody wants checkpoints there; else that it cannot be written to is
            only a warning.
    """
    place = _nearest(folder)
    free, kind = shutil.disk_usage(place).free, _file_system(place)
    where = f"{folder.absolute()}: {format_bytes(free)} free, {kind}"
    figures = {"folder": str(folder.absolute()), "free_nbytes": free, "file_system": kind}
    try:
        if free < SAMPLE_NBYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write, read = _measure(place)
    except OSError as failure:
        full = failure.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "make room there" if full else "change its rights"
        remedy = f"{what}, or name another folder with --checkpoint-dir"
        status: Status = "error" if chosen else "warning"
        text = f"{where}; it cannot be written to: {failure.strerror or failure}"
        yield Finding("checkpoint folder", status, text, remedy, figures)
        return
    figures |= {"write_bytes_per_s": write, "read_bytes_per_s": read}
    text = f"{where}, writes {format_rate(write)}, reads {format_rate(read)}"
    if kind in _VOLATILE:
        remedy = "that is memory: checkpoints are gone when the machine stops. Name a disk"
        yield warning("checkpoint folder", text, remedy, **figures)
    elif write < _SLOW_BYTES_PER_S:
        remedy = "a checkpoint of 1 billion parameters takes 12 GB: name a faster disk"
        yield warning("checkpoint folder", text, remedy, **figures)
    else:
        yield ok("checkpoint folder", text, **figures)


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.is_dir())


def _file_system(place: Path) -> str:
    """What kind of file system a folder is on."""
    real = os.path.realpath(place)
    mounts = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([real, part.mountpoint]) == part.mountpoint
    ]
    found = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return found.fstype if found is not None else "an unknown file system"


def _measure(folder: Path) -> tuple[float, float]:
    """Bytes per second written, durably, and read, past the cache where that can be had.

    Raises:
        OSError: if it cannot be written there.
    """
    chunk = os.urandom(_CHUNK_NBYTES)
    with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX, buffering=0) as file:
        begun, written = time.perf_counter(), 0
        while written < SAMPLE_NBYTES and time.perf_counter() - begun < SAMPLE_S:
            written += file.write(chunk)
        os.fsync(file.fileno())
        wrote_s = time.perf_counter() - begun
        if hasattr(os, "posix_fadvise"):  # not everywhere
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begun = time.perf_counter()
        while file.read(_CHUNK_NBYTES) and time.perf_counter() - begun < SAMPLE_S:
            pass
        read_s = time.perf_counter() - begun
        read = file.tell()
    return written / max(wrote_s, 1e-9), read / max(read_s, 1e-9)


def look_at_caches() -> Iterator[Finding]:
    """What is kept for the next run: where, how much, whose."""
    folder = cache_folder()
    if not folder.is_dir():
        yield _absent_cache(folder)
        return
    status = folder.stat()
    owner, mode = _user(status.st_uid), f"{status.st_mode & 0o7777:o}"
    number, size, other = _contents(folder)
    text = f"{folder}: {counted(number, 'file')}, {format_bytes(size)}, of {owner}, mode {mode}"
    figures = {"folder": str(folder), "files": number, "nbytes": size, "owner": owner}
    figures |= {"mode": mode, "others": other}
    if status.st_mode & 0o022 or other:
        remedy = f"chmod -R go-w {folder}, or rm -r it: what others can write to is built again"
        what = (
            f"; of other users: {counted(other, 'file')}" if other else "; others may write to it"
        )
        yield warning("cache", text + what, remedy, **figures)
    elif why := _why_not_writable(folder):
        yield warning("cache", f"{text}; it cannot be written to ({why})", _ELSEWHERE, **figures)
    else:
        yield ok("cache", text, **figures)


def _absent_cache(folder: Path) -> Finding:
    above = next(path for path in (folder, *folder.parents) if path.exists())
    why = _why_not_writable(above)
    if why is None:
        return ok("cache", f"{folder}: made by the first run", folder=str(folder))
    return warning("cache", f"{folder} cannot be made in {above} ({why})", _ELSEWHERE)


def _why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder; None if one can: rights alone do not say that."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX):
            return None
    except OSError as failure:
        return failure.strerror or str(failure)


def _contents(folder: Path) -> tuple[int, int, int]:
    """Files, their bytes, and how many of them are of another user."""
    number = size = other = 0
    mine = (os.geteuid(), 0)
    for place, _, names in os.walk(folder):
        for name in names:
            if number >= _MOST_FILES:
                return number, size, other
            status = Path(place, name).lstat()
            number, size = number + 1, size + status.st_size
            other += status.st_uid not in mine
    return number, size, other


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
