"""Builds the virtual GPU's library at first use and finds it in the cache afterwards."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harmony.core.files import cache_folder
from harmony.core.warn import warn
from harmony.errors import VirtualGPUError

_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")
_ADMINISTRATOR = 0


def library_path() -> Path:
    """Return the built library, building it first if this torch has none in the cache (20 s).

    Several processes may call this at once: one builds, the others wait. What is in the cache is
    only used if it is ours, nobody else may write to it, and it is what was built; else it is
    built again. Without a folder to keep it in it is built for this process alone.

    Raises:
        VirtualGPUError: without a C++ compiler, or if the compiler fails.
    """
    sources, compiler, library = source_directory(), find_compiler(), kept_library()
    directory = library.parent
    if _is_sound(library):
        return library
    try:
        with _locked(directory):
            if not _is_sound(library):
                _build(sources, compiler, library)
        if _is_sound(library):
            return library
        why = f"{directory} is not ours alone"
    except OSError as error:
        why = str(error)
    warn(
        f"the virtual GPU cannot be kept for the next run ({why}): it is built for this process. "
        "HARMONY_CACHE names a folder for it",
    )
    return _build_for_now(sources, compiler)


def kept_library() -> Path:
    """Where the library that fits this torch, compiler and these sources is kept once it is built.

    Raises:
        VirtualGPUError: without a C++ compiler, or without the sources.
    """
    fingerprint = _fingerprint(source_directory(), find_compiler())
    return cache_folder() / f"vgpu-{fingerprint}" / "libvgpu.so"


def _build_for_now(sources: Path, compiler: str) -> Path:
    """Build the library in a folder that goes when the process ends."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix="harmony-vgpu-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        library = scratch / "libvgpu.so"
        _build(sources, compiler, library)
    except OSError as error:
        raise VirtualGPUError(
            f"no place to build the virtual GPU: {error}. HARMONY_CACHE names a folder for it"
        ) from None
    return library


def _is_sound(library: Path) -> bool:
    """Whether a library is there, nobody else can have written to it, and no byte has changed."""
    try:
        for path in (library.parent, library):
            status = path.lstat()
            if status.st_uid not in (os.geteuid(), _ADMINISTRATOR) or status.st_mode & 0o022:
                return False
        if not stat.S_ISREG(library.lstat().st_mode) or library.parent.is_symlink():
            return False
        return _digest_file(library).read_text(encoding="ascii") == _digest(library)
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Make a folder that only we can write to, and let one process at a time work in it.

    Raises:
        OSError: if it cannot be made, or is somebody else's.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{directory} is somebody else's")
    directory.chmod(0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(directory / "lock", flags, 0o600), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def source_directory() -> Path:
    """Return the folder of the C++ sources, of the checkout or of the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "kernels" / "vgpu", package / "_kernels" / "vgpu"):
        if (candidate / "vgpu.cpp").exists():
            return candidate
    raise VirtualGPUError(
        f"the virtual GPU's sources are neither in {package.parent / 'kernels' / 'vgpu'} nor in "
        f"{package / '_kernels' / 'vgpu'}; reinstall harmony"
    )


def find_compiler() -> str:
    """The C++ compiler that builds the virtual GPU: ``$CXX``, else g++ or clang++.

    Raises:
        VirtualGPUError: if there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise VirtualGPUError(
        "the virtual GPU is compiled at first use and no C++ compiler was found: install one "
        "(apt-get install g++, or dnf install gcc-c++), or name it in the variable CXX"
    )


def _fingerprint(sources: Path, compiler: str) -> str:
    """Whatever the library depends on: sources, torch, compiler, flags."""
    import torch

    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, errors="replace", check=False
    )
    digest = hashlib.sha256()
    for part in (torch.__version__, torch.__file__, compiler, version.stdout, *_FLAGS):
        digest.update(part.encode() + b"\0")
    for path in sorted(sources.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _command(sources: Path, compiler: str, output: Path) -> list[str]:
    import torch

    root = Path(torch.__file__).parent
    include, library = root / "include", root / "lib"
    return [
        compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        str(sources / "vgpu.cpp"),
        *("-o", str(output), f"-L{library}", "-ltorch_cpu", "-ltorch", "-lc10"),
        f"-Wl,-rpath,{library}",
    ]


def _build(sources: Path, compiler: str, library: Path) -> None:
    # Built beside its place and renamed, so that no process ever loads half a library.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        command = _command(sources, compiler, output)
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise VirtualGPUError(
                f"the virtual GPU did not compile (Python {sys.version.split()[0]}): "
                + "; ".join(errors[:3] or [done.stderr[-500:]])
                + f"\nthe command was: {' '.join(command)}"
            )
        output.chmod(0o700)
        _digest_file(output).write_text(_digest(output), encoding="ascii")
        # What was there goes with its name: a folder or a link cannot be in the way.
        for made, place in ((_digest_file(output), _digest_file(library)), (output, library)):
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            made.replace(place)
