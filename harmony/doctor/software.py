"""Versions, the compiler of the virtual GPU, and the kernels in use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

from harmony.core.files import PACKAGE
from harmony.core.version import __version__
from harmony.doctor.findings import Finding, counted, error, ok, warning
from harmony.errors import VirtualGPUError
from harmony.vgpu.build import library

OLDEST_TORCH = (2, 10)
_LIBRARIES = ("numpy", "networkx", "psutil", "rich", "safetensors", "nvidia-ml-py")
_CUDA = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",  # its older name
)


def look_at_python() -> Iterator[Finding]:
    """Harmony, Python and the libraries that it needs."""
    yield ok("harmony", f"{__version__} in {PACKAGE}", version=__version__, folder=str(PACKAGE))
    version = platform.python_version()
    yield ok("Python", f"{version}, {platform.platform()}", version=version)
    found = {name: _version(name) for name in _LIBRARIES}
    text = ", ".join(f"{name} {version or 'absent'}" for name, version in found.items())
    yield ok("libraries", text, **found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def look_at_torch() -> Iterator[Finding]:
    """PyTorch, and what it was built for."""
    import torch

    version = str(torch.__version__)
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    figures = {"version": version, "cuda": torch.version.cuda}
    if numbers < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        remedy = f"Harmony needs torch {wanted} or newer: pip install 'torch>={wanted}'"
        yield error("torch", f"{version}, built {built}", remedy, **figures)
        return
    yield ok("torch", f"{version}, built {built}", **figures)
    chosen = {name: os.environ[name] for name in _CUDA if name in os.environ}
    if chosen:
        text = ", ".join(f"{name}={value}" for name, value in chosen.items())
        yield ok("CUDA variables", text, **chosen)


def look_at_kernels() -> Iterator[Finding]:
    """Whose kernels compute, and the settings that choose among them."""
    import torch

    cpu = torch.backends.cpu.get_cpu_capability()
    threads = counted(torch.get_num_threads(), "thread")
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    figures = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": precision,
        "deterministic": deterministic,
    }
    text = (
        f"PyTorch's: {cpu} on the host, {threads}; fp32 products in {precision!r} precision, "
        f"deterministic algorithms {'on' if deterministic else 'off'}"
    )
    if torch.cuda.is_available():
        figures["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        text += f"; cuDNN {figures['cudnn']}"
    yield ok("kernels", text, **figures)


def look_at_updates() -> Iterator[Finding]:
    """Whether kernels of our own update on the host: the compiler, and what they are here."""
    import torch

    from harmony.runtime.update.native_step import LIBRARY, NotCompiledError, describe

    try:
        compiler, place = LIBRARY.compiler(), LIBRARY.kept()
    except NotCompiledError as failure:
        text = "by the loops of torch.optim: the same bits, several times as slow"
        yield warning("updates", text, str(failure))
        return
    state = "kernels to be built at first use (5 s)"
    if place.exists():
        state = describe(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    yield ok("updates", f"AdamW on the host: {state}", compiler=compiler, library=str(place))


def look_at_virtual_gpus() -> Iterator[Finding]:
    """Whether virtual GPUs can be used: the compiler, and whether their library is built."""
    from harmony.vgpu.torch_device import MAX_COUNT

    try:
        compiler, place = library().compiler(), library().kept()
    except VirtualGPUError as failure:
        yield warning("virtual GPUs", "there are none, for want of a compiler", str(failure))
        return
    state = "built" if place.exists() else "to be built at first use (20 s)"
    text = f"up to {MAX_COUNT}; library {state}; compiler {compiler}"
    yield ok(
        "virtual GPUs",
        text,
        compiler=compiler,
        library=str(place),
        built=place.exists(),
        most=MAX_COUNT,
    )
