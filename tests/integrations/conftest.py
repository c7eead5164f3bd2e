"""Virtual GPUs; what else other libraries say and keep is theirs."""

from __future__ import annotations

import pytest

from tests.training.conftest import _free_devices, vgpus

__all__ = ["_free_devices", "vgpus"]

_skipped: list[str] = []


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note the files whose library is not installed."""
    if report.skipped:
        _skipped.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Let a run of nothing but such files pass: each file may be run in a process of its own."""
    if _skipped and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
