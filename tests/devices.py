"""The devices that tests run on: virtual GPUs, the stand-in's (scripts/test-cuda), or real ones.

`pytest --device cuda` takes the machine's GPUs. Under scripts/test-cuda that is a rehearsal: the
stand-in then has last bits of its own, as a GPU has, and limits are held as there.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import harmony
from harmony.core.units import parse_bytes
from harmony.runtime import hardware
from harmony.vgpu import api as vgpu
from tests import references
from tests.cuda import standin

TYPE = "cuda" if standin.is_loaded() else "vgpu"
"""What PyTorch calls them."""

REAL = False
"""Whether they are real GPUs, whose kernels have other last bits than the CPU's."""

RESERVE_NBYTES = 512 * 2**20
"""What `harmony.runtime.native.reserve_nbytes` leaves of a small GPU's memory."""

on_real_gpus = pytest.mark.on_real_gpus
"""Marks tests outside of tests/training that hold on real GPUs."""


def choose(name: str) -> None:
    """Take the devices that the command line names, before anything runs on them.

    Args:
        name: ``"cuda"`` for real GPUs, else virtual ones or the stand-in's.

    Raises:
        pytest.UsageError: if there is no GPU.
    """
    global TYPE, REAL
    if name != "cuda":
        return
    if not standin.is_loaded() and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no GPU")
    TYPE, REAL = "cuda", True
    # Where optimizers run on GPUs, their last bits are not those of the reference's on the host.
    inspect.unwrap(harmony.Harmony.__init__).__kwdefaults__["updates"] = "host"
    # Products are then summed in the same order on each stream; cuBLAS reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def device(index: int = 0) -> torch.device:
    """Return one of the devices."""
    return torch.device(TYPE, index)


def reference() -> torch.device:
    """Where plain PyTorch computes what has to be the same, bit for bit.

    The CPU, whose kernels virtual GPUs and the stand-in's use; of real GPUs the first one.
    """
    return device() if REAL else torch.device("cpu")


def virtual_only(why: str) -> pytest.MarkDecorator:
    """Mark a test that says something of virtual GPUs, or of what only they have."""
    return pytest.mark.skipif(TYPE != "vgpu", reason=f"virtual GPUs only: {why}")


def provide(count: int = 4, memory: str | int = "64MiB", **settings: Any) -> None:
    """Set devices up.

    Skips the test on others than virtual GPUs if it asks for the speed of links or of kernels. A
    virtual GPU holds its limit to the byte; of the others the plan knows the limit, and the
    libraries' reserve comes on top of it.
    """
    if TYPE == "vgpu":
        vgpu.virtual_gpus(count=count, memory=memory, **settings)
    elif settings:
        pytest.skip(f"only virtual GPUs have {', '.join(settings)}")
    elif REAL:
        _limit(count, parse_bytes(memory) + RESERVE_NBYTES)
    else:
        standin.set_memory(parse_bytes(memory) + RESERVE_NBYTES)
        torch.accelerator.device_count = lambda: count


@functools.cache
def _count() -> int:
    """GPUs of the machine; asked before the first test limits them."""
    return torch.cuda.device_count()


def _limit(count: int, nbytes: int) -> None:
    """Let real GPUs be as many, and as large, as a test wants: at most what there is."""
    there = min(count, _count())
    for index in range(there):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), index)

    def memory_info(of: Any = None) -> tuple[int, int]:
        index = torch.cuda.current_device() if of is None else torch.device(of).index or 0
        return max(0, nbytes - torch.cuda.memory_reserved(index)), nbytes

    torch.cuda.empty_cache()
    torch.accelerator.device_count = lambda: there
    torch.accelerator.get_memory_info = memory_info


@contextlib.contextmanager
def only_what_there_is() -> Iterator[None]:
    """Skip a test that asks for more real GPUs than the machine has."""
    if not REAL:
        yield
        return

    def choose(devices: Any, *rest: Any) -> list[torch.device]:
        names = devices if isinstance(devices, (list, tuple)) else []
        indices = [torch.device(name).index or 0 for name in names]
        wanted = devices if isinstance(devices, int) else 1 + max(indices, default=0)
        if _count() < wanted <= 4:
            pytest.skip(f"wants {wanted} GPUs, and there are {_count()}")
        return hardware.choose_devices(devices, *rest)

    before = harmony.module.choose_devices
    harmony.module.choose_devices = choose
    try:
        yield
    finally:
        harmony.module.choose_devices = before


def live_nbytes() -> int:
    """Return the bytes of all tensors on devices, when what was enqueued has run."""
    if TYPE == "vgpu":
        return int(vgpu._require().vgpu_live_nbytes())
    return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))


def compute_as_reference(on: bool) -> None:
    """Let plain PyTorch on `reference()` compute the same, bit for bit; virtual GPUs always do."""
    if REAL:
        torch.backends.cudnn.deterministic = on
        torch.use_deterministic_algorithms(on, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = not on
    if REAL and standin.is_loaded():
        standin.have_own_bits(on)
    elif TYPE == "cuda" and not REAL:
        standin.decompose_as_cpu(on)


@contextlib.contextmanager
def computing_references() -> Iterator[None]:
    """Let the first real GPU compute what a test computes on the host beside Harmony."""
    if not REAL:
        yield
        return
    with references.computed_on(device()):
        yield


def held(stream: torch.Stream) -> AbstractContextManager[None]:
    """Keep a stream from running what is enqueued from now on until the block ends."""
    if REAL:
        pytest.skip("a real GPU's stream cannot be held")
    return standin.held(stream) if TYPE == "cuda" else vgpu.held(stream)


def recover() -> None:
    """Go on after a kernel that failed, which may have taken the devices with it."""
    if standin.is_loaded():
        for index in range(torch.cuda.device_count()):
            standin.find_device()
            with contextlib.suppress(RuntimeError):  # of kernels that had been enqueued behind it
                torch.cuda.synchronize(index)
        standin.find_device()
