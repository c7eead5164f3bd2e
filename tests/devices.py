"""The devices that tests run on: virtual GPUs, or the stand-in's under scripts/test-cuda."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch

from harmony.vgpu import api as vgpu
from tests.cuda import standin

TYPE = "cuda" if standin.is_loaded() else "vgpu"
"""What PyTorch calls them."""


def device(index: int = 0) -> torch.device:
    """Return one of the devices."""
    return torch.device(TYPE, index)


def provide(count: int = 4, memory: str = "64MiB", **settings: Any) -> None:
    """Set devices up; the number of the stand-in's, their speed and timing are what they are."""
    if TYPE == "vgpu":
        vgpu.virtual_gpus(count=count, memory=memory, **settings)


def held(stream: torch.Stream) -> AbstractContextManager[None]:
    """Keep a stream from running what is enqueued from now on until the block ends."""
    return standin.held(stream) if TYPE == "cuda" else vgpu.held(stream)


def recover() -> None:
    """Go on after a kernel that failed, which may have taken the devices with it."""
    if TYPE == "cuda":
        for index in range(torch.cuda.device_count()):
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(index)
        standin.find_device()
