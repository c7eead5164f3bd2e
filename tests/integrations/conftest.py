"""Virtual GPUs; what else other libraries say and keep is theirs."""

from __future__ import annotations

import pytest

from tests.training.conftest import _free_devices, vgpus

__all__ = ["_free_devices", "vgpus"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
