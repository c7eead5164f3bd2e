"""The planner draws no random numbers and needs no torch, so its tests do not wait for it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _seed_of_the_references() -> None:
    """Nothing is drawn here."""
