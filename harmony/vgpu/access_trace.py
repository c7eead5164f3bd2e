"""The access trace: which stream touched which bytes, and what orders streams and host threads.

A library that runs kernels on streams of its own takes it: the virtual GPU, and the stand-in for
the CUDA runtime (``kernels/fakecuda``). A real GPU has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from harmony.errors import VirtualGPUError

_library: ctypes.CDLL | None = None
_device_type = ""

is_open = False
"""Whether a trace is open; looked at before each entry, so it is no function."""


def attach(library: ctypes.CDLL, device_type: str) -> None:
    """Let a library that has the functions of ``kernels/vgpu/trace_capi.cpp`` take the trace.

    Args:
        library: where they are.
        device_type: what PyTorch calls its devices, ``"vgpu"`` or ``"cuda"``.
    """
    global _library, _device_type
    pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "vgpu_trace_enable": (None, [ctypes.c_int]),
        "vgpu_trace_drain": (None, [pointer] * 5),
        "vgpu_host_access": (None, [ctypes.c_char_p, u64, u64, ctypes.c_int]),
        "vgpu_host_release": (None, [ctypes.c_int64]),
        "vgpu_host_acquire": (None, [ctypes.c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _library, _device_type = library, device_type


def device_type() -> str:
    """What PyTorch calls the devices that are traced; empty if there are none."""
    return _device_type


def _attached() -> ctypes.CDLL:
    if _library is None:
        raise VirtualGPUError(
            "only virtual GPUs keep an access trace, and there are none yet: call "
            "harmony.virtual_gpus() first"
        )
    return _library


class Access(NamedTuple):
    """Bytes ``[ptr, ptr + nbytes)`` that an operation reads or writes."""

    ptr: int
    nbytes: int
    is_write: bool


class Record(NamedTuple):
    """One entry of the access trace; ``kernels/vgpu/trace.h`` lists the kinds.

    Device and stream are -1 where none takes part; ``aux`` is the id of an event or a token.
    """

    kind: str
    thread: int
    device: int
    stream: int
    aux: int
    what: str
    accesses: tuple[Access, ...]


_RECORD = struct.Struct("=qIiIIhc5x")  # PackedRecord in kernels/vgpu/trace.h
_ACCESS = struct.Struct("=QQ")


class Trace:
    """The records taken while ``trace()`` was open, in enqueue order."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def drain(self) -> list[Record]:
        """Move what was recorded since the last drain to ``records`` and return it."""
        fresh = _drain()
        self.records.extend(fresh)
        return fresh


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Record every access and every ordering edge while open; ``records`` is filled on exit."""
    global is_open
    library = _attached()
    if is_open:
        raise VirtualGPUError("a trace is open already; only one can be at a time")
    _drain()
    taken = Trace()
    library.vgpu_trace_enable(1)
    is_open = True
    try:
        yield taken
    finally:
        is_open = False
        library.vgpu_trace_enable(0)
        taken.drain()


def host_access(what: str, address: int, nbytes: int, write: bool) -> None:
    """Put an access of the calling thread to host memory into the trace."""
    _attached().vgpu_host_access(what.encode(), address, nbytes, int(write))


def host_release(token: int) -> None:
    """Publish, under a token not below 0, all that the calling thread did so far."""
    _attached().vgpu_host_release(token)


def host_acquire(token: int) -> None:
    """Order what the calling thread does next behind what was published under ``token``."""
    _attached().vgpu_host_acquire(token)


def _drain() -> list[Record]:
    records, accesses, text = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_char_p()
    num_records, num_accesses = ctypes.c_uint64(), ctypes.c_uint64()
    _attached().vgpu_trace_drain(
        *map(ctypes.byref, (records, num_records, accesses, num_accesses, text))
    )
    names = (text.value or b"").decode().split("\n")
    unpacked = [
        Access(ptr, packed >> 1, bool(packed & 1))
        for ptr, packed in _ACCESS.iter_unpack(
            _bytes_at(accesses, num_accesses.value * _ACCESS.size)
        )
    ]
    result, used = [], 0
    for aux, thread, stream, what, count, device, kind in _RECORD.iter_unpack(
        _bytes_at(records, num_records.value * _RECORD.size)
    ):
        own = tuple(unpacked[used : used + count])
        used += count
        result.append(Record(kind.decode(), thread, device, stream, aux, names[what], own))
    return result


def _bytes_at(pointer: ctypes.c_void_p, nbytes: int) -> bytes:
    return ctypes.string_at(pointer.value, nbytes) if pointer.value else b""
