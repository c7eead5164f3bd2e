"""The stand-in for the CUDA runtime, as tests use it (see kernels/fakecuda/README.md)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harmony.vgpu import access_trace

ROOT = Path(__file__).resolve().parents[2]
_KERNELS = "FAKECUDA_KERNELS"


def is_loaded() -> bool:
    """Whether this process runs on the stand-in: it is preloaded (scripts/test-cuda)."""
    return _KERNELS in os.environ


def install() -> None:
    """Let CPU kernels answer the operators on the GPUs; what has no answer is an error.

    From then on there is an access trace, so that the race checker works.
    """
    torch.cuda.init()  # type: ignore[no-untyped-call]
    kernels = ctypes.CDLL(os.environ[_KERNELS])
    kernels.fakecuda_install()
    access_trace.attach(kernels, "cuda")
    # TorchScript's fuser compiles kernels by the driver, of which there is nothing here.
    torch._C._jit_override_can_fuse_on_gpu(False)
    torch._C._jit_set_texpr_fuser_enabled(False)


@dataclass(frozen=True)
class Count:
    """How often something was called, and the bytes of it."""

    calls: int
    nbytes: int


def counters() -> dict[str, Count]:
    """Everything that is counted, since the process began; the names are in state.cpp."""
    read = ctypes.CDLL(None).fakecuda_counters
    read.restype = ctypes.c_char_p
    found = {}
    for part in read().decode().split():
        name, _, figures = part.partition("=")
        found[name] = Count(*map(int, figures.split(":")))
    return found


def calls_since(before: dict[str, Count]) -> dict[str, int]:
    """Calls of each name since ``before = counters()``."""
    return {name: now.calls - before[name].calls for name, now in counters().items()}


MANNERS = ("alone", "losing", "losing later")
"""How a call fails: nothing else does; from then on no call works; no call works from when the
stream runs what it enqueued, so that another call is the first to be told."""


def fail(name: str, nth: int, error: int, manner: str = "alone") -> None:
    """Let the nth call of this name from now on fail with this error of CUDA."""
    library = ctypes.CDLL(None)
    assert library.fakecuda_fail(name.encode(), nth, error, MANNERS.index(manner)), name


def lose_device() -> None:
    """Let every call from now on fail, as after an assert in a kernel."""
    ctypes.CDLL(None).fakecuda_lose_device()


def find_device() -> None:
    """Let calls work again after a kernel has failed; on a GPU only a new process does that."""
    ctypes.CDLL(None).fakecuda_find_device()


def set_memory(nbytes: int) -> None:
    """Let each GPU have this much memory beside its context."""
    ctypes.CDLL(None).fakecuda_set_memory(ctypes.c_size_t(nbytes))


def decompose_as_cpu(on: bool) -> None:
    """Whether composites are taken apart as for the CPU, whose results are then the same bits."""
    ctypes.CDLL(os.environ[_KERNELS]).fakecuda_decompose_as_cpu(on)


def have_own_bits(on: bool) -> None:
    """Whether products, sums and series have last bits that are not the CPU's, as on a GPU."""
    ctypes.CDLL(os.environ[_KERNELS]).fakecuda_own_bits(on)


def others_take(mib: int) -> None:
    """Let other processes hold so many MiB of each GPU."""
    ctypes.CDLL(None).fakecuda_set_others_mib(mib)


def has_context(device: int) -> bool:
    """Whether this process has a context on a GPU."""
    return bool(ctypes.CDLL(None).fakecuda_has_context(device))


@contextlib.contextmanager
def held(stream: torch.Stream) -> Iterator[None]:
    """Keep a stream from running what is enqueued from now on until the block ends."""
    library = ctypes.CDLL(None)
    library.fakecuda_hold.argtypes = library.fakecuda_release.argtypes = [ctypes.c_void_p]
    library.fakecuda_hold.restype = ctypes.c_void_p
    handle = torch.cuda.Stream(  # type: ignore[no-untyped-call]
        stream_id=stream.stream_id, device_index=stream.device.index, device_type=1
    ).cuda_stream
    gate = library.fakecuda_hold(handle)
    try:
        yield
    finally:
        library.fakecuda_release(gate)


def run(script: str, **settings: object) -> str:
    """Run a script in a process of its own, on GPUs that these settings describe.

    Returns:
        What it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.update({f"FAKECUDA_{name.upper()}": str(v) for name, v in settings.items()})
    done = subprocess.run(
        [sys.executable, "-c", "from tests.cuda import standin; standin.install()\n" + script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=600,  # of a busy machine
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
