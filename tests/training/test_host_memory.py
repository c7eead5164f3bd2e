"""Host memory that was freed goes back to the system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harmony.runtime.host import limits

PAGE = 4096


def resident_nbytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(limits._malloc_trim() is None, reason="the C library keeps nothing")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Blocks too small for pages of their own, with one behind them that stays."""
    blocks = [torch.zeros(24 * PAGE, dtype=torch.uint8) for _ in range(600)]
    stays = torch.zeros(24 * PAGE, dtype=torch.uint8)
    del blocks
    before = resident_nbytes()
    limits.give_back_freed()
    assert before - resident_nbytes() > 40 << 20
    assert stays.sum() == 0


def test_where_the_c_library_gives_nothing_back_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "_malloc_trim", lambda: None)
    limits.give_back_freed()
