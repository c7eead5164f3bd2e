"""The devices that tests run on: virtual GPUs, or the stand-in's under scripts/test-cuda."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from harmony.core.units import parse_bytes
from harmony.vgpu import api as vgpu
from tests.cuda import standin

TYPE = "cuda" if standin.is_loaded() else "vgpu"
"""What PyTorch calls them."""

RESERVE_NBYTES = 512 * 2**20
"""What `harmony.runtime.native.reserve_nbytes` leaves of a small GPU's memory."""


def device(index: int = 0) -> torch.device:
    """Return one of the devices."""
    return torch.device(TYPE, index)


def virtual_only(why: str) -> pytest.MarkDecorator:
    """Mark a test that says something of virtual GPUs, or of what only they have."""
    return pytest.mark.skipif(TYPE != "vgpu", reason=f"virtual GPUs only: {why}")


def provide(count: int = 4, memory: str | int = "64MiB", **settings: Any) -> None:
    """Set devices up.

    Skips the test on the stand-in if it asks for the speed of links or of kernels, which only
    virtual GPUs have. A virtual GPU holds its limit to the byte; of the stand-in's the plan knows
    the limit, and the libraries' reserve comes on top of it.
    """
    if TYPE == "vgpu":
        vgpu.virtual_gpus(count=count, memory=memory, **settings)
    elif settings:
        pytest.skip(f"only virtual GPUs have {', '.join(settings)}")
    else:
        standin.set_memory(parse_bytes(memory) + RESERVE_NBYTES)
        torch.accelerator.device_count = lambda: count


def live_nbytes() -> int:
    """Return the bytes of all tensors on devices, when what was enqueued has run."""
    if TYPE == "vgpu":
        return int(vgpu._require().vgpu_live_nbytes())
    return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))


def compute_as_cpu(on: bool) -> None:
    """Let plain PyTorch on the CPU be a reference, bit for bit; virtual GPUs always do."""
    if TYPE == "cuda":
        standin.decompose_as_cpu(on)


def held(stream: torch.Stream) -> AbstractContextManager[None]:
    """Keep a stream from running what is enqueued from now on until the block ends."""
    return standin.held(stream) if TYPE == "cuda" else vgpu.held(stream)


def recover() -> None:
    """Go on after a kernel that failed, which may have taken the devices with it."""
    if TYPE == "cuda":
        for index in range(torch.cuda.device_count()):
            standin.find_device()
            with contextlib.suppress(RuntimeError):  # of kernels that had been enqueued behind it
                torch.cuda.synchronize(index)
        standin.find_device()
