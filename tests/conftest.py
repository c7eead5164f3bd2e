"""Tests measure for themselves, and models that are given no seed have the references' own, 0."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.cuda import standin

os.environ["HARMONY_MEASUREMENTS"] = "off"

# Time says nothing on a busy machine. `--hypothesis-profile dev` reports slow examples and slow
# strategies to the author of a new one.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", deadline=2000, suppress_health_check=[])
settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _answers_of_the_stand_in() -> None:
    if standin.is_loaded():
        torch.set_num_threads(1)
        standin.install()


@pytest.fixture(autouse=True)
def _seed_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain PyTorch's `harmony.seed_microbatch(step, index)` be what a model draws from."""
    monkeypatch.setattr("harmony.module.drawn_seed", lambda: 0)
