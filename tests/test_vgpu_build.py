"""Building the virtual GPU: cache, several processes at once, no compiler, bad sources."""

import subprocess
import sys

import pytest

from harmony.errors import VirtualGPUError
from harmony.runtime import vgpu_build


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path))
    with pytest.raises(VirtualGPUError, match=r"apt-get install g\+\+") as error:
        vgpu_build.library_path()
    assert "\n" not in str(error.value)


def test_importing_harmony_builds_nothing(tmp_path):
    script = "import harmony, harmony.runtime.vgpu as v; assert not v.is_loaded()"
    environment = {"HARMONY_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


@pytest.fixture
def small_sources(monkeypatch, tmp_path):
    """A library that compiles in no time, in place of the real one."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "vgpu.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vgpu_build, "source_directory", lambda: sources)
    return sources


def test_built_once_and_again_when_a_source_changes(small_sources):
    first = vgpu_build.library_path()
    modified = first.stat().st_mtime_ns
    assert vgpu_build.library_path() == first and first.stat().st_mtime_ns == modified
    (small_sources / "other.h").write_text("// something new")
    assert vgpu_build.library_path() != first


def test_compile_errors_are_shown(small_sources):
    (small_sources / "vgpu.cpp").write_text("int f() { return nonsense; }")
    with pytest.raises(VirtualGPUError, match=r"did not compile.*nonsense"):
        vgpu_build.library_path()


def test_processes_that_start_at_once_build_once(small_sources, tmp_path):
    script = (
        "import sys, pathlib; from harmony.runtime import vgpu_build as b;"
        f"b.source_directory = lambda: pathlib.Path({str(small_sources)!r});"
        "print(b.library_path(), b.library_path().stat().st_mtime_ns)"
    )
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)
    assert len(list((tmp_path / "cache").glob("*/*.so"))) == 1


@pytest.mark.slow
def test_the_real_sources_build_without_warnings(tmp_path):
    command = vgpu_build._command(vgpu_build.source_directory(), "g++", tmp_path / "x.so")
    done = subprocess.run([*command, "-Werror"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = f"import torch; torch.ops.load_library({str(tmp_path / 'x.so')!r})"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_exit_with_work_still_enqueued():
    script = (
        "import torch, harmony.runtime.vgpu as v; v.virtual_gpus(count=1, delay_us=20000)\n"
        "x = torch.ones(4, device='vgpu')\n"
        "for _ in range(1000): x.add_(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 and not done.stderr
