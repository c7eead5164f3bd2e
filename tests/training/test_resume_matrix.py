"""A part of scripts/resume_matrix.py, which has all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from resume_matrix import Case, Matrix

from tests import devices
from tests.training.conftest import VirtualGPUs

CASES = (
    Case("train_step", "fp32", False, 1, "other memory", "waited for"),
    Case("train_step", "bf16", True, 4, "other GPUs", "meanwhile"),
    Case("overlapped", "fp32", True, 2, "other GPUs", "waited for"),
    Case("overlapped", "bf16", False, 2, "other memory", "meanwhile"),
    Case("own loop", "bf16", True, 1, "other GPUs", "meanwhile"),
    Case("own loop", "fp32", False, 2, "same", "meanwhile", "dp"),
    Case("train_step", "fp32", True, 2, "other GPUs", "waited for", "dp"),
)


@devices.virtual_only("the memory of its plans is counted in bytes of virtual GPUs")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_is_the_one_that_went_on(
    vgpus: VirtualGPUs, tmp_path: Path, case: Case
) -> None:
    assert Matrix().run(case, tmp_path) is None
