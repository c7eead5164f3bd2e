"""Memory of the host: limits of control groups of both versions, wherever the process is."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from harmony.runtime.host import limits as hostlimits

MIB = 2**20


def group(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hostlimits, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hostlimits, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


def test_a_limit_of_version_1_is_read(tree: Path) -> None:
    files = {"memory.limit_in_bytes": 100 * MIB, "memory.usage_in_bytes": 30 * MIB}
    group(tree / "cgroup" / "memory", files)
    assert hostlimits.available_host_nbytes() == 70 * MIB
    assert hostlimits.total_host_nbytes() == 100 * MIB


def test_a_limit_of_version_2_is_read(tree: Path) -> None:
    group(tree / "cgroup", {"memory.max": 100 * MIB, "memory.current": 30 * MIB})
    assert hostlimits.available_host_nbytes() == 70 * MIB
    assert hostlimits.total_host_nbytes() == 100 * MIB


@pytest.mark.parametrize(
    ("own", "folder", "limit", "used"),
    [
        ("0::/user/one\n", "user", "memory.max", "memory.current"),
        (
            "5:cpu,memory:/box/7\n0::/\n",
            "memory/box/7",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
    ],
)
def test_the_limit_of_a_group_below_the_root_counts(
    tree: Path, own: str, folder: str, limit: str, used: str
) -> None:
    (tree / "own").write_text(own)
    group(tree / "cgroup" / folder, {limit: 64 * MIB, used: 60 * MIB})
    assert hostlimits.available_host_nbytes() == 4 * MIB


@pytest.mark.parametrize("limit", ["max", "", "many", 2**63 - 4096])
def test_without_a_limit_what_is_free_counts(tree: Path, limit: object) -> None:
    group(tree / "cgroup", {"memory.max": limit, "memory.current": 5})
    assert hostlimits.total_host_nbytes() == psutil.virtual_memory().total
    assert hostlimits.available_host_nbytes() > 0


def test_a_group_that_is_over_its_limit_has_nothing_left(tree: Path) -> None:
    group(tree / "cgroup", {"memory.max": MIB, "memory.current": 2 * MIB})
    assert hostlimits.available_host_nbytes() == 0
