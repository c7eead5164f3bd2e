"""Tests measure for themselves, and models that are given no seed have the references' own, 0."""

from __future__ import annotations

import os

import pytest

os.environ["HARMONY_MEASUREMENTS"] = "off"


@pytest.fixture(autouse=True)
def _seed_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plain PyTorch's `harmony.seed_microbatch(step, index)` be what a model draws from."""
    monkeypatch.setattr("harmony.module.drawn_seed", lambda: 0)
