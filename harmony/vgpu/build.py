"""The virtual GPU's library: how it is compiled against the torch that is installed."""

from __future__ import annotations

from pathlib import Path

from harmony.core.compiled import Compiled
from harmony.errors import VirtualGPUError

_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter")


def library() -> Compiled:
    """The library that fits this torch; building it takes some 20 s."""
    import torch

    root = Path(torch.__file__).parent
    include, libraries = root / "include", root / "lib"
    links = (
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        *(f"-L{libraries}", "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{libraries}"),
    )
    depends = (torch.__version__, torch.__file__)
    takes = "half a minute, longer on a busy machine"
    return Compiled("the virtual GPU", "vgpu", _FLAGS, VirtualGPUError, depends, links, takes)
