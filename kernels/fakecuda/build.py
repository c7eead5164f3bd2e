"""Builds the stand-in for the CUDA runtime against the CUDA build of torch that runs this.

    python build.py FOLDER

makes in FOLDER ``libfakecuda.so`` (to be preloaded), ``driver/libcuda.so.1`` (the driver that one
of torch's libraries asks the linker for) and ``libkernels.so`` (results; loaded after torch). It
runs without a GPU and without a driver: torch is only looked at, never initialised.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_TORCH_LIBRARIES = ("torch_cuda", "torch_cuda_linalg", "torch_python", "torch_cpu", "c10_cuda")
_NOT_SUPPORTED = 801


def site_packages() -> Path:
    """Return the folder that torch and NVIDIA's packages are installed in."""
    for folder in map(Path, sys.path):
        if (folder / "torch" / "lib" / "libtorch_cuda.so").exists():
            return folder
    raise SystemExit("this Python has no CUDA build of torch: pip install torch, without +cpu")


def undefined_symbols(library: Path) -> set[str]:
    """Return the names of the functions that a library expects of others."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in text.splitlines() if line.strip()}


def stubs(needed: set[str], written: set[str]) -> str:
    """Return C for the functions that torch needs and nobody has written out.

    Those of the runtime say that they are not supported; those of the libraries do nothing, or
    refuse (see ``fakecuda_library_call``).
    """
    lines = ["extern int fakecuda_library_call(const char *);"]
    for name in sorted(needed - written):
        if re.match(r"(cublas|cudnn[A-Z])", name) and name != "cudnnGetVersion":
            lines.append(f'int {name}(void) {{ return fakecuda_library_call("{name}"); }}')
        elif re.match(r"(__)?cuda[A-Z]", name):
            lines.append(f"int {name}(void) {{ return {_NOT_SUPPORTED}; }}")
    return "\n".join(lines)


def driver(needed: set[str]) -> str:
    """Return C for a driver library of which every function succeeds and does nothing."""
    names = {name for name in needed if re.match("cu[A-Z]", name)}
    names -= {"cuDevicePrimaryCtxGetState"}
    names |= {"cuInit", "cuGetProcAddress_v2"}
    lines = [f"int {name}(void) {{ return 0; }}" for name in sorted(names)]
    lines.append(
        "extern _Bool fakecuda_has_context(int device);\n"
        "int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)"
        " { *flags = 0; *active = fakecuda_has_context(device); return 0; }"
    )
    return "\n".join(lines)


def run(*command: object) -> None:
    """Run a command of the compiler, and show what it says if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[:8000]}")


def build_runtime(folder: Path, packages: Path) -> None:
    """Build ``libfakecuda.so`` and ``driver/libcuda.so.1``."""
    libraries = packages / "torch" / "lib"
    needed = set().union(*(undefined_symbols(libraries / f"lib{n}.so") for n in _TORCH_LIBRARIES))
    text = "\n".join(path.read_text() for path in HERE.glob("*.cpp"))
    written = set(re.findall(r"FAKECUDA_API [\w \*]*?(\w+)\(", text))
    (folder / "stubs.c").write_text(stubs(needed, written))
    run("gcc", "-O1", "-w", "-fPIC", "-c", folder / "stubs.c", "-o", folder / "stubs.o")
    include = next(packages.glob("nvidia/cu*/include/cuda_runtime_api.h")).parent
    run(
        *("g++", "-std=c++17", "-O1", "-Wall", "-fPIC", "-shared", "-isystem", include),
        *(HERE / "runtime.cpp", folder / "stubs.o", "-o", folder / "libfakecuda.so", "-lpthread"),
    )
    (folder / "driver").mkdir(exist_ok=True)
    (folder / "driver.c").write_text(
        driver(undefined_symbols(libraries / "libcaffe2_nvrtc.so"))
    )
    run(
        *("gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", folder / "driver.c"),
        *("-o", folder / "driver" / "libcuda.so.1"),
    )


def build_kernels(folder: Path, packages: Path) -> None:
    """Build ``libkernels.so``."""
    torch = packages / "torch"
    include = torch / "include"
    cuda = next(packages.glob("nvidia/cu*/include/cuda_runtime_api.h")).parent
    run(
        *("g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", HERE / "kernels.cpp"),
        *("-isystem", include, "-isystem", include / "torch/csrc/api/include"),
        *("-isystem", cuda, "-o", folder / "libkernels.so", f"-L{torch / 'lib'}"),
        *("-ltorch_cpu", "-lc10", "-lc10_cuda"),
        *(f"-L{folder}", "-lfakecuda", f"-Wl,-rpath,{torch / 'lib'}", f"-Wl,-rpath,{folder}"),
    )


def main() -> None:
    """Build what is named, or everything."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    packages = site_packages()
    build_runtime(folder, packages)
    build_kernels(folder, packages)


if __name__ == "__main__":
    main()
