"""Tests measure for themselves, and models that are given no seed have the references' own, 0."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from harmony.core.machine import Machine
from harmony.profiling import measured, server
from harmony.runtime import native
from harmony.runtime.device import DeviceContext
from harmony.vgpu import api as vgpu
from tests import devices
from tests.cuda import standin

os.environ["HARMONY_MEASUREMENTS"] = "off"

# Time says nothing on a busy machine. `--hypothesis-profile dev` reports slow examples and slow
# strategies to the author of a new one.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=2000, suppress_health_check=[])
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--first-cases",
        action="store_true",
        help="of each test of tests/training the first case only; none that draws its own cases",
    )
    parser.addoption(
        "--device",
        choices=("imitation", "cuda"),
        default="imitation",
        help="cuda: on real GPUs, the tests that hold there; under scripts/test-cuda a rehearsal",
    )
    parser.addoption(
        "--unmarked",
        action="store_true",
        help="with --device cuda: also tests outside of tests/training that are not marked for it",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the devices before a test module asks which they are."""
    devices.choose(config.getoption("--device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `--first-cases` says, and on real GPUs what is not marked for them."""
    if devices.REAL and not config.getoption("--unmarked"):
        for item in items:
            marked = any(map(item.get_closest_marker, ("on_real_gpus", "cuda")))
            if not marked and "training" not in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="not marked for real GPUs"))
    if not config.getoption("--first-cases"):
        return
    seen, kept = set(), []
    for item in items:
        function = getattr(item, "function", None)
        in_training = "training" in item.path.parts
        if in_training and (function in seen or hasattr(function, "hypothesis")):
            continue
        seen.add(function)
        kept.append(item)
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def _answers_of_the_stand_in() -> None:
    if standin.is_loaded():
        torch.set_num_threads(1)
        standin.install()
    if devices.TYPE == "cuda":
        server._LARGER_THAN_CACHES_NBYTES = 2**20  # what updates cost is nothing that tests ask


@pytest.fixture(autouse=True)
def _seed_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain PyTorch's `harmony.seed_microbatch(step, index)` be what a model draws from."""
    monkeypatch.setattr("harmony.module.drawn_seed", lambda: 0)


@pytest.fixture(scope="session")
def _imported() -> Iterator[list[bool]]:
    """Whether a test has run, and with it all has been imported that is imported at first use."""
    done: list[bool] = []
    yield done
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _modules_are_no_garbage(_imported: list[bool]) -> Iterator[None]:
    """Let the collector pass over the million objects of PyTorch's modules: 0.2 s each time."""
    yield
    if not _imported:
        gc.collect()
        gc.freeze()
        _imported.append(True)


_machines: dict[object, Machine] = {}


@pytest.fixture(autouse=True)
def _virtual_gpus_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take what an earlier test of the process measured of virtual GPUs with the same settings."""
    measure = server.measure_machine

    def measure_once(contexts: Sequence[DeviceContext], *limits: int | None) -> Machine:
        devices = [context.device for context in contexts]
        if not all(map(native.is_virtual, devices)):
            return measure(contexts, *limits)
        settings: dict[str, Any] = vgpu.current_settings()
        seen = repr((settings, devices, list(map(native.memory_info, devices)), limits))
        if seen not in _machines:
            _machines[seen] = measure(contexts, *limits)
        return _machines[seen]

    monkeypatch.setattr(measured, "measure_machine", measure_once)
