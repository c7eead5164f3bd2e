"""Devices for every test, the stand-in's or virtual ones, with the race checker on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from tests import devices, race_check

VirtualGPUs = Callable[..., None]


@pytest.fixture(autouse=True)
def _free_devices() -> Iterator[None]:
    """Let go of a test's models, and of what it broke: the next one sets its devices up."""
    yield
    gc.collect()
    devices.recover()


@pytest.fixture(autouse=True)
def _the_reference_computes_the_same() -> Iterator[None]:
    devices.compute_as_reference(True)
    with devices.only_what_there_is(), devices.computing_references():
        yield
    devices.compute_as_reference(False)


@pytest.fixture
def vgpus() -> Iterator[VirtualGPUs]:
    """Set up devices; what the test runs on them is checked for races when it ends."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    devices.provide(count=4, memory="64MiB")

    def configure(**settings: object) -> None:
        gc.collect()
        devices.provide(**{"count": 4, "memory": "64MiB", **settings})

    with race_check.checked(ordered_frees=True):
        yield configure
    gc.collect()
    torch.set_num_threads(threads)
