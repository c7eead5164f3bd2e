"""Building native code: cache, several processes at once, no compiler, bad sources."""

import subprocess
import sys

import pytest

from harmony.core import compiled
from harmony.core.compiled import Compiled
from harmony.errors import VirtualGPUError
from harmony.vgpu import build as vgpu_build


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path))
    with pytest.raises(VirtualGPUError, match=r"apt-get install g\+\+") as error:
        vgpu_build.library().path()
    assert "\n" not in str(error.value)


def test_importing_harmony_builds_nothing(tmp_path):
    script = "import harmony, harmony.vgpu.api as v; assert not v.is_loaded()"
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
    monkeypatch.setattr(Compiled, "sources", lambda _: sources)
    return sources


def test_built_once_and_again_when_a_source_changes(small_sources, capsys):
    first = vgpu_build.library().path()
    assert capsys.readouterr().err.startswith("harmony: compiling the virtual GPU, once (")
    modified = first.stat().st_mtime_ns
    assert vgpu_build.library().path() == first and first.stat().st_mtime_ns == modified
    assert not capsys.readouterr().err
    (small_sources / "other.h").write_text("// something new")
    assert vgpu_build.library().path() != first


def test_compile_errors_are_shown(small_sources):
    (small_sources / "vgpu.cpp").write_text("int f() { return nonsense; }")
    with pytest.raises(VirtualGPUError, match=r"did not compile.*nonsense"):
        vgpu_build.library().path()


def test_processes_that_start_at_once_build_once(small_sources, tmp_path):
    script = (
        "import pathlib; from harmony.core.compiled import Compiled;"
        "from harmony.vgpu.build import library;"
        f"Compiled.sources = lambda _: pathlib.Path({str(small_sources)!r});"
        "print(library().path(), library().path().stat().st_mtime_ns)"
    )
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)
    assert len(list((tmp_path / "cache").glob("*/*.so"))) == 1


@pytest.mark.slow
def test_the_real_sources_build_without_warnings(tmp_path):
    command = vgpu_build.library().command(tmp_path / "x.so")
    done = subprocess.run([*command, "-Werror"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = f"import torch; torch.ops.load_library({str(tmp_path / 'x.so')!r})"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_exit_with_work_still_enqueued():
    script = (
        "import torch, harmony.vgpu.api as v; v.virtual_gpus(count=1, delay_us=20000)\n"
        "x = torch.ones(4, device='vgpu')\n"
        "for _ in range(1000): x.add_(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0 and not done.stderr


# What is in the cache is code: it is loaded only if nobody else can have written it


def damage(library):
    """Cut a library off."""
    library.write_bytes(library.read_bytes()[:100])


def exchange(library):
    """Put another library in its place."""
    library.write_bytes(b"another")


def link(library):
    """Put a link in its place."""
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


def folder(library):
    """Put a folder in its place."""
    library.unlink()
    library.mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        damage,
        exchange,
        link,
        folder,
        lambda library: library.chmod(0o777),
        lambda library: library.parent.chmod(0o777),
        lambda library: library.with_suffix(".sha256").unlink(),
    ],
    ids=["damaged", "exchanged", "link", "folder", "writable", "folder writable", "no digest"],
)
def test_a_library_that_is_not_what_was_built_is_built_again(small_sources, spoil):
    library = vgpu_build.library().path()
    good = library.read_bytes()
    spoil(library)
    assert vgpu_build.library().path() == library
    assert library.read_bytes() == good and not library.is_symlink()
    assert library.stat().st_mode & 0o022 == 0 and library.parent.stat().st_mode & 0o022 == 0


def test_a_library_of_somebody_else_is_never_loaded(small_sources, monkeypatch):
    """Whoever owns the folder could exchange it again: it is built for this process alone."""
    library = vgpu_build.library().path()
    monkeypatch.setattr(compiled.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(compiled, "_ADMINISTRATOR", 54321)
    with pytest.warns(UserWarning, match="cannot be kept for the next run.*HARMONY_CACHE"):
        found = vgpu_build.library().path()
    assert found != library and found.exists()


def test_a_lock_is_not_opened_through_a_link(small_sources, tmp_path):
    library = vgpu_build.library().path()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (library.parent / "lock").unlink()
    (library.parent / "lock").symlink_to(victim)
    library.unlink()
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert vgpu_build.library().path() != library
    assert victim.read_text() == "precious"


def test_without_a_folder_for_the_cache_it_is_built_for_the_process(
    small_sources, monkeypatch, tmp_path
):
    """As on a read-only home: it takes its 20 seconds in every run, and trains."""
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("HARMONY_CACHE", str(tmp_path / "occupied"))
    with pytest.warns(UserWarning, match="HARMONY_CACHE names a folder for it"):
        assert vgpu_build.library().path().exists()
