"""The virtual GPU: a PyTorch device ``vgpu`` that runs on the CPU but behaves like a GPU.

    import harmony.vgpu.api as vgpu

    vgpu.virtual_gpus(count=2, memory="64MiB", link="8GB/s")
    x = torch.randn(1024, device="vgpu:1")  # OutOfMemoryError beyond 64 MiB

Streams, events, pinned memory and ``record_stream`` are used through ``torch.Stream``,
``torch.Event`` and ``torch.accelerator``, as for any other accelerator. The device itself is
written in C++ (``kernels/vgpu``), compiled at first use; importing this module compiles nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.backend_registration

from harmony.core.arguments import named_arguments
from harmony.core.units import parse_bytes, parse_rate
from harmony.errors import ConfigError, VirtualGPUError
from harmony.vgpu import access_trace, build
from harmony.vgpu.torch_device import MAX_COUNT, VirtualGPUModule

_DEFAULTS: dict[str, Any] = {
    "count": 2,
    "memory": "1GiB",
    "delay_us": 0.0,
    "slowdown": 1.0,
    "jitter_us": 0.0,
    "jitter_seed": 0,
    "num_threads": 1,
}
_RANGES: dict[str, tuple[type, float, float]] = {
    "count": (int, 1, MAX_COUNT),
    "delay_us": (float, 0, 1e7),
    "slowdown": (float, 1, 1e6),
    "jitter_us": (float, 0, 1e7),
    "jitter_seed": (int, 0, 2**63 - 1),
    "num_threads": (int, 1, 1024),
}
_PARSERS: dict[str, Callable[[str], Any]] = {
    **{key: type(value) for key, value in _DEFAULTS.items()},
    **dict.fromkeys(("link", "h2d", "d2h", "p2p"), str),
}


_load_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_current: dict[str, Any] = {}


@named_arguments
def virtual_gpus(
    count: int | None = None,
    memory: str | int | None = None,
    link: str | float | None = None,
    *,
    h2d: str | float | None = None,
    d2h: str | float | None = None,
    p2p: str | float | None = None,
    delay_us: float | None = None,
    slowdown: float | None = None,
    jitter_us: float | None = None,
    jitter_seed: int | None = None,
    num_threads: int | None = None,
) -> None:
    """Provide ``count`` virtual GPUs, ``torch.device("vgpu:0")`` and so on.

    What is not given comes from the variable ``HARMONY_VGPU`` (``count=4,memory=64MiB``), else is
    the default. May be called again with other values: ``count`` and ``memory`` can only change
    while no tensor lives on a virtual GPU, the rest at any time.

    Args:
        count: number of devices, 1 to 16; default 2.
        memory: hard limit of each device, bytes (``"64MiB"``); default 1 GiB.
        link: bandwidth in bytes per second (``"8GB/s"``) of every link and direction that has no
            value of its own; default unlimited.
        h2d: host to device, of each device.
        d2h: device to host, of each device.
        p2p: between devices, of each device and direction.
        delay_us: added to the time of every operator, microseconds; default 0.
        slowdown: operators take this many times their time on the CPU; default 1.
        jitter_us: random delay before every task of a stream, uniform from 0, microseconds;
            default 0.
        jitter_seed: makes the random delays of each stream repeatable; default 0.
        num_threads: compute threads of each stream, default 1; holds for streams not yet used.

    Raises:
        VirtualGPUError: if it cannot be built, or if memory that must go is in use.
        ConfigError: if a size or a rate cannot be parsed, or a number is out of its range.
    """
    given = {key: value for key, value in locals().items() if value is not None}
    chosen = _DEFAULTS | _settings_from_environment() | given
    _check_settings(chosen)
    rates = [chosen.get(key, chosen.get("link")) for key in ("h2d", "d2h", "p2p")]
    parsed_rates = [parse_rate(rate) if rate is not None else 0.0 for rate in rates]
    nbytes = parse_bytes(chosen["memory"])
    library = _load()
    error = library.vgpu_configure(chosen["count"], nbytes)
    if error is not None:
        gc.collect()  # tensors that nobody holds any more are in nobody's way
        error = library.vgpu_configure(chosen["count"], nbytes)
    _check(error)
    library.vgpu_set_links(*parsed_rates)
    timing = (chosen[key] for key in ("delay_us", "slowdown", "jitter_us", "jitter_seed"))
    library.vgpu_set_timing(*timing)
    library.vgpu_set_num_threads(chosen["num_threads"])
    _current.clear()
    _current.update(chosen, memory=nbytes)


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse numbers that no virtual GPU can have.

    Raises:
        ConfigError: naming the setting.
    """
    for key, (kind, low, high) in _RANGES.items():
        value = settings[key]
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not fits or not low <= value <= high:
            raise ConfigError(f"virtual GPUs: {key} is {low} to {high}, not {str(value)[:40]}")


def current_settings() -> dict[str, Any]:
    """What the virtual GPUs of this process are set to, as `virtual_gpus` names it."""
    return dict(_current)


def ensure_available() -> None:
    """Load the virtual GPU if nobody did yet, as ``HARMONY_VGPU`` says or with the defaults."""
    if not is_loaded():
        virtual_gpus()


def is_loaded() -> bool:
    """Return whether this process has virtual GPUs."""
    return _library is not None


def _settings_from_environment() -> dict[str, Any]:
    """Parse ``HARMONY_VGPU``, e.g. ``count=4,memory=64MiB,link=8GB/s``."""
    settings: dict[str, Any] = {}
    for item in filter(None, os.environ.get("HARMONY_VGPU", "").split(",")):
        key, _, value = item.strip().partition("=")
        if key not in _PARSERS:
            raise VirtualGPUError(
                f"HARMONY_VGPU: unknown key {key!r}; there are {', '.join(_PARSERS)}"
            )
        try:
            settings[key] = _PARSERS[key](value)
        except ValueError:
            raise VirtualGPUError(
                f"HARMONY_VGPU: cannot read {item!r}; write it like count=4,memory=64MiB"
            ) from None
    return settings


# ---------------------------------------------------------------- loading


def _load() -> ctypes.CDLL:
    global _library
    with _load_lock:
        if _library is None:
            path = str(build.library().path())
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
            library = ctypes.CDLL(path)
            _declare(library)
            access_trace.attach(library, "vgpu")
            _register_device_module(library)
            # Before static destructors run: a worker must not compute while PyTorch goes away.
            atexit.register(library.vgpu_shutdown)
            _library = library
    return _library


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures in ``kernels/vgpu/capi.cpp``."""
    text, u64, f64 = ctypes.c_char_p, ctypes.c_uint64, ctypes.c_double
    pointer = ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "vgpu_configure": (text, [ctypes.c_int, u64]),
        "vgpu_set_links": (None, [f64, f64, f64]),
        "vgpu_set_timing": (None, [f64, f64, f64, u64]),
        "vgpu_set_num_threads": (None, [ctypes.c_int]),
        "vgpu_device_count": (ctypes.c_int, []),
        "vgpu_memory_nbytes": (u64, []),
        "vgpu_live_nbytes": (u64, []),
        "vgpu_in_forked_child": (ctypes.c_int, []),
        "vgpu_shutdown": (None, []),
        "vgpu_hold": (pointer, [ctypes.c_int, ctypes.c_int64]),
        "vgpu_release": (None, [pointer]),
        "vgpu_link_nbytes": (u64, [ctypes.c_int, ctypes.c_int]),
        "vgpu_reset_link_counters": (None, []),
        "vgpu_host_register": (text, [pointer, u64]),
        "vgpu_host_unregister": (text, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _check(error: bytes | None) -> None:
    if error is not None:
        raise VirtualGPUError(error.decode())


def _register_device_module(library: ctypes.CDLL) -> None:
    backend = torch.utils.backend_registration
    backend.rename_privateuse1_backend("vgpu")
    module = VirtualGPUModule(library)
    torch._register_device_module("vgpu", module)  # type: ignore[no-untyped-call]
    backend.generate_methods_for_privateuse1_backend(for_storage=True)
    # A torch.manual_seed() before the device was there counts for it too, as on CUDA.
    module.manual_seed_all(torch.initial_seed())


def _require() -> ctypes.CDLL:
    if _library is None:
        raise VirtualGPUError("there is no virtual GPU yet: call harmony.virtual_gpus() first")
    return _library


# ---------------------------------------------------------------- host memory and links


def host_register(address: int, nbytes: int) -> None:
    """Pin a range of host memory that exists already, such as an ``mmap``, like cudaHostRegister.

    Copies from and to it are then asynchronous and its tensors' ``is_pinned()`` is true.

    Raises:
        VirtualGPUError: if part of the range is pinned already.
    """
    _check(_require().vgpu_host_register(address, nbytes))


def host_unregister(address: int) -> None:
    """Undo ``host_register``, after waiting for the copies that use the range.

    Raises:
        VirtualGPUError: if no range was registered at this address.
    """
    _check(_require().vgpu_host_unregister(address))


@dataclass(frozen=True)
class LinkTraffic:
    """Bytes that crossed the links of one device since ``reset_link_traffic``."""

    h2d_nbytes: int
    d2h_nbytes: int
    p2p_sent_nbytes: int
    p2p_received_nbytes: int


def link_traffic(device: int) -> LinkTraffic:
    """Return what crossed the links of a device; copies count when they are done."""
    return LinkTraffic(*(int(_require().vgpu_link_nbytes(device, d)) for d in range(4)))


def reset_link_traffic() -> None:
    """Set the counters of all links to zero."""
    _require().vgpu_reset_link_counters()


@contextlib.contextmanager
def held(stream: torch.Stream) -> Iterator[None]:
    """Keep a stream from running what is enqueued from now on until the block ends.

    For tests of what is asynchronous. To synchronise with the stream inside would never end.
    """
    gate = _require().vgpu_hold(stream.device.index, stream.stream_id)
    try:
        yield
    finally:
        _require().vgpu_release(gate)
