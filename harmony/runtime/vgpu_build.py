"""Builds the virtual GPU's library at first use and finds it in the cache afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harmony.errors import VirtualGPUError

_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")


def library_path() -> Path:
    """Return the built library, building it first if this torch has none in the cache (20 s).

    The cache is ``$HARMONY_CACHE``, or ``~/.cache/harmony``. Several processes may call this at
    once: one builds, the others wait.

    Raises:
        VirtualGPUError: without a C++ compiler, or if the compiler fails.
    """
    sources = source_directory()
    compiler = _compiler()
    directory = _cache_directory() / f"vgpu-{_fingerprint(sources, compiler)}"
    library = directory / "libvgpu.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(sources, compiler, library)
    return library


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


def _cache_directory() -> Path:
    configured = os.environ.get("HARMONY_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "harmony"


def _compiler() -> str:
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

    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
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
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise VirtualGPUError(
                f"the virtual GPU did not compile (Python {sys.version.split()[0]}): "
                + "; ".join(errors[:3] or [done.stderr[-500:]])
                + f"\nthe command was: {' '.join(command)}"
            )
        output.replace(library)
