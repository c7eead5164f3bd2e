"""Virtual GPUs for every test, and the race checker on in all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from harmony.vgpu import api as vgpu
from harmony.vgpu import race_check as racecheck

VirtualGPUs = Callable[..., None]


@pytest.fixture(autouse=True)
def _free_devices() -> Iterator[None]:
    """Let go of a test's models, so that the next one may set up other virtual GPUs."""
    yield
    gc.collect()


@pytest.fixture
def vgpus() -> Iterator[VirtualGPUs]:
    """Set up virtual GPUs; what the test runs on them is checked for races when it ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    vgpu.virtual_gpus(count=4, memory="64MiB")

    def configure(**settings: object) -> None:
        gc.collect()
        vgpu.virtual_gpus(**{"count": 4, "memory": "64MiB", **settings})

    with racecheck.checked(ordered_frees=True):
        yield configure
    gc.collect()
    torch.set_num_threads(threads)
