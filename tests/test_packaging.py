"""What is built to be installed: a wheel without native code, an sdist with all of a clone."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not in a clone")
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()]
    (folder / "tracked").write_text("\n".join(names))
    copy = folder / "copy"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for kind in ("sdist", "bdist_wheel"):
        line = [sys.executable, "setup.py", "-q", kind, "--dist-dir", str(folder)]
        done = subprocess.run(line, cwd=copy, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_wheel_is_for_every_platform_and_holds_the_kernels_sources(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith("harmony_train-") and wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not {name for name in names if name.endswith((".so", ".o", ".pyc"))}
    expected = {"harmony/py.typed", "harmony/report/page.html"}
    for source in (ROOT / "kernels").rglob("*"):
        if source.suffix in (".cpp", ".h", ".py") and "__pycache__" not in source.parts:
            expected.add(f"harmony/_kernels/{source.relative_to(ROOT / 'kernels').as_posix()}")
    assert expected <= names
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    said = zipfile.ZipFile(wheel).read(entry).decode()
    assert "harmony-run = harmony.cli.main:main" in said


def test_a_source_distribution_has_what_a_clone_has(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = set((built / "tracked").read_text().splitlines())
    hidden = {name for name in tracked if name.startswith(".") and not name.startswith(".ci/")}
    assert tracked - hidden <= names
