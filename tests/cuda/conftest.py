"""Tests of the CUDA path, on a stand-in for the CUDA runtime: `scripts/test-cuda` runs them.

Those that ask nothing of the stand-in also run on real GPUs: `pytest --device cuda`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import devices, race_check
from tests.cuda import standin

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the stand-in where it is not preloaded."""
    if standin.is_loaded():
        return
    for item in items:
        here = _HERE in item.path.parents
        if here and not (devices.REAL and item.get_closest_marker("on_real_gpus")):
            item.add_marker(pytest.mark.skip(reason="on the stand-in only: scripts/test-cuda"))


@pytest.fixture(autouse=True)
def _no_misuse() -> Iterator[None]:
    """What CUDA would refuse is an error of every test, also where nobody looks."""
    if not standin.is_loaded():
        yield
        return
    before = standin.counters()
    yield
    gc.collect()
    devices.recover()
    assert standin.calls_since(before)["misuse"] == 0


@pytest.fixture(autouse=True)
def _as_many_gpus_as_there_are() -> Iterator[None]:
    with devices.only_what_there_is():
        yield


@pytest.fixture(autouse=True)
def _no_race() -> Iterator[None]:
    """What nothing orders is an error of every test, whatever the timing was."""
    with race_check.checked(ordered_frees=True):
        yield
