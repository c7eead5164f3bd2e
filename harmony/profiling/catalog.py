"""GPUs, links and hosts by name: what their vendors state and what is achieved of it.

To describe a machine that you do not have, name its parts: `machine_of("RTX 4090", 4, 256 GiB)`.
Peaks are dense (no sparsity), per GPU, for products that accumulate in fp32; memory is what the
driver reports. Figures that PyTorch reaches are lower, and are fractions with a source here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from harmony.core.machine import Device, Host, Machine, Switch
from harmony.errors import ConfigError

TERA = 1e12
MIB = 2**20

MATMUL_SHARE = 0.80
"""Of the dense tensor peak, where nobody has published a measurement of the GPU: the middle of the
measured ones (A100 0.87, H100 0.80, B200 0.78)."""

FP32_SHARE = 0.75
"""Of the fp32 peak that large matrix products reach without tensor cores. With it, the roofline of
a GPT-2 XL block on a GTX 1080 Ti meets the times that the original Harmony measured there."""

MEMORY_SHARE = 0.80
"""Of a GPU's memory bandwidth that kernels which only read and write reach."""

RESERVE_SHARE = 0.05
"""Of a GPU's memory that no plan counts on, as `harmony.runtime.native.reserve_nbytes`."""

UPDATE_TRAFFIC = 7.0
"""Bytes that an update moves for each byte of gradient: Adam in fp32 reads weights, gradients and
two states, and writes weights and two states."""

_MAMF = "S. Bekman, ML Engineering, maximum achievable matmul table (2024/25)"


@dataclass(frozen=True)
class Gpu:
    """A GPU as its vendor describes it.

    Attributes:
        name: what the command line calls it.
        memory_nbytes: bytes that the driver reports.
        flops: dense peak FLOP/s by ``"fp32"``, ``"tf32"``, ``"bf16"``, ``"fp16"``; a type that it
            has no units for is left out and runs at the rate of fp32.
        memory_bytes_per_s: bandwidth of its own memory.
        pcie: generation of its 16 lanes.
        peer_bytes_per_s: to another GPU and direction over NVLink or the like; 0 if there is none.
        matmul_share: of the peak of tensor cores that large products reach.
        server: whether it is made for servers (its host then has more memory channels).
        kernel_s: what every kernel takes beside its work.
        source: where the figures come from.
        share_source: where ``matmul_share`` comes from; empty for `MATMUL_SHARE`.
    """

    name: str
    memory_nbytes: int
    flops: Mapping[str, float]
    memory_bytes_per_s: float
    pcie: int
    peer_bytes_per_s: float = 0.0
    matmul_share: float = MATMUL_SHARE
    server: bool = False
    source: str = ""
    share_source: str = ""
    aliases: tuple[str, ...] = field(default=(), repr=False)
    kernel_s: float = 0.0

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of a type."""
        return self.flops.get(dtype, self.flops["fp32"])

    def achievable(self, dtype: str) -> float:
        """FLOP/s that large matrix products of a type reach."""
        if dtype == "fp32" or dtype not in self.flops:
            return self.flops["fp32"] * FP32_SHARE
        return self.flops[dtype] * self.matmul_share

    @property
    def usable_nbytes(self) -> int:
        """Bytes of its memory that a plan may use."""
        return self.memory_nbytes - max(512 * MIB, int(self.memory_nbytes * RESERVE_SHARE))


def _gpu(
    name: str,
    memory_mib: int,
    tflops: tuple[float, float, float, float],
    memory_gb_per_s: float,
    pcie: int,
    source: str,
    *,
    peer_gb_per_s: float = 0.0,
    share: float = MATMUL_SHARE,
    measured: bool = False,
    server: bool = False,
    aliases: tuple[str, ...] = (),
) -> Gpu:
    """A row of the table; TFLOP/s of fp32, tf32, bf16, fp16, where 0 means that it has none."""
    rates = zip(("fp32", "tf32", "bf16", "fp16"), tflops, strict=True)
    return Gpu(
        name,
        memory_mib * MIB,
        {dtype: rate * TERA for dtype, rate in rates if rate},
        memory_gb_per_s * 1e9,
        pcie,
        peer_gb_per_s * 1e9,
        share,
        server,
        source,
        _MAMF if measured else "",
        aliases,
    )


_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper V2 (2021)"
_ADA = "NVIDIA Ada GPU architecture whitepaper (2023), appendix A"
_HOPPER = "NVIDIA H100 datasheet (2023), sparse figures halved"

GPUS = (
    _gpu("GTX 1080 Ti", 11178, (11.3, 0, 0, 0), 484, 3,
         "NVIDIA GeForce GTX 1080 Ti specifications (2017); no tensor cores, fp16 at 1/64"),
    _gpu("RTX 3060", 12288, (12.7, 12.7, 25.5, 25.5), 360, 4,
         "NVIDIA GeForce RTX 3060 specifications (2021); tensor rates in the ratios of GA102"),
    _gpu("RTX 3080", 10240, (29.8, 29.8, 59.5, 59.5), 760, 4, _GA102),
    _gpu("RTX 3090", 24576, (35.6, 35.6, 71.0, 71.0), 936, 4, _GA102, peer_gb_per_s=56.25),
    _gpu("RTX 4080", 16376, (48.7, 48.7, 97.5, 97.5), 716.8, 4, _ADA),
    _gpu("RTX 4090", 24564, (82.6, 82.6, 165.2, 165.2), 1008, 4, _ADA),
    _gpu("RTX 5090", 32607, (104.8, 104.8, 209.5, 209.5), 1792, 5,
         "NVIDIA RTX Blackwell GPU architecture whitepaper (2025), appendix A"),
    _gpu("RTX A5000", 24564, (27.8, 55.6, 111.1, 111.1), 768, 4,
         "NVIDIA RTX A5000 datasheet (2021), sparse figures halved",
         peer_gb_per_s=56.25, aliases=("A5000",)),
    _gpu("RTX A6000", 49140, (38.7, 77.4, 154.8, 154.8), 768, 4, _GA102,
         peer_gb_per_s=56.25, aliases=("A6000",)),
    _gpu("T4", 15360, (8.1, 0, 0, 65.0), 320, 3,
         "NVIDIA T4 datasheet (2019); share: Jia et al., Dissecting the NVidia Turing T4 GPU via"
         " Microbenchmarking (2019): its 70 W hold large products far below the peak",
         share=0.5, server=True, aliases=("Tesla T4",)),
    _gpu("V100 16GB", 16384, (15.7, 0, 0, 125.0), 900, 3, "NVIDIA V100 datasheet (2020), SXM2",
         peer_gb_per_s=150, server=True, aliases=("V100-SXM2-16GB",)),
    _gpu("V100 32GB", 32768, (15.7, 0, 0, 125.0), 900, 3, "NVIDIA V100 datasheet (2020), SXM2",
         peer_gb_per_s=150, server=True, aliases=("V100", "V100-SXM2-32GB")),
    _gpu("A10", 23028, (31.2, 62.5, 125.0, 125.0), 600, 4, "NVIDIA A10 datasheet (2021)",
         server=True),
    _gpu("L4", 23034, (30.3, 60.0, 121.0, 121.0), 300, 4,
         "NVIDIA L4 datasheet (2023), sparse figures halved", server=True),
    _gpu("L40S", 46068, (91.6, 183.0, 362.0, 362.0), 864, 4, "NVIDIA L40S datasheet (2023)",
         server=True),
    _gpu("A100 40GB", 40960, (19.5, 156.0, 312.0, 312.0), 1555, 4,
         "NVIDIA A100 datasheet (2020), SXM4", peer_gb_per_s=300, share=0.87, measured=True,
         server=True, aliases=("A100-SXM4-40GB",)),
    _gpu("A100 PCIe 40GB", 40960, (19.5, 156.0, 312.0, 312.0), 1555, 4,
         "NVIDIA A100 datasheet (2020), PCIe", share=0.81, measured=True, server=True,
         aliases=("A100-PCIE-40GB",)),
    _gpu("A100 80GB", 81920, (19.5, 156.0, 312.0, 312.0), 2039, 4,
         "NVIDIA A100 80GB datasheet (2021), SXM4", peer_gb_per_s=300, share=0.87,
         measured=True, server=True, aliases=("A100", "A100-SXM4-80GB")),
    _gpu("A100 PCIe 80GB", 81920, (19.5, 156.0, 312.0, 312.0), 1935, 4,
         "NVIDIA A100 80GB datasheet (2021), PCIe", share=0.81, measured=True, server=True,
         aliases=("A100 80GB PCIe",)),
    _gpu("H100 PCIe", 81559, (51.0, 378.0, 756.0, 756.0), 2000, 5, _HOPPER,
         peer_gb_per_s=300, server=True),
    _gpu("H100 SXM", 81559, (67.0, 494.5, 989.0, 989.0), 3350, 5, _HOPPER,
         peer_gb_per_s=450, share=0.80, measured=True, server=True,
         aliases=("H100", "H100 80GB HBM3")),
    _gpu("H200", 143771, (67.0, 494.5, 989.0, 989.0), 4800, 5,
         "NVIDIA H200 datasheet (2024), sparse figures halved", peer_gb_per_s=450, share=0.80,
         measured=True, server=True, aliases=("H200 SXM",)),
    _gpu("B200", 183359, (75.0, 1125.0, 2250.0, 2250.0), 7700, 5,
         "NVIDIA HGX B200 datasheet (2025), an eighth, sparse figures halved", peer_gb_per_s=900,
         share=0.78, measured=True, server=True, aliases=("B200 SXM",)),
    _gpu("MI250X", 65520, (23.95, 0, 191.5, 191.5), 1638, 4,
         "AMD Instinct MI250X datasheet (2021), one of its two dies, which is one device",
         peer_gb_per_s=50, server=True),
    _gpu("MI300X", 196592, (163.4, 653.7, 1307.4, 1307.4), 5300, 5,
         "AMD Instinct MI300X datasheet (2023)", peer_gb_per_s=64, share=0.51, measured=True,
         server=True),
)  # fmt: skip

MOST_GPUS = 256
"""Of one server, to be planned for."""

PCIE_BYTES_PER_S = {3: 12.3e9, 4: 24.8e9, 5: 55.6e9}
"""Copies between pinned host memory and a GPU on 16 lanes, one direction. Generation 3: the 11.5
GiB/s that the original Harmony measured on a GTX 1080 Ti; 4 and 5: nvbandwidth on an A100 and on
an H100, host_to_device_memcpy_ce, as posted on NVIDIA's developer forum and blog (2024)."""

PCIE_PEER_SHARE = 0.8
"""Of that between two GPUs without a link of their own: through the root complex (the original
Harmony measured 8.2 of 11.5 GiB/s on a GTX 1080 Ti)."""

LAUNCH_S = 5e-6
"""Seconds that the host takes to launch one kernel: 3.8 us in A. Gray, Getting Started with CUDA
Graphs (NVIDIA, 2019), with PyTorch's dispatch on top."""

TASK_OVERHEAD_S = 1e-4
"""Seconds of a Run beyond its layers: its instructions are issued from Python."""


@dataclass(frozen=True)
class HostKind:
    """A kind of host.

    Attributes:
        bytes_per_s: memory bandwidth that all cores together reach, about 80 % of
            channels x transfers x 8 bytes.
        num_cores: CPU cores of a usual one.
    """

    name: str
    bytes_per_s: float
    num_cores: int
    about: str


HOSTS = (
    HostKind("desktop-ddr4", 40e9, 8, "2 channels of DDR4-3200 (51.2 GB/s)"),
    HostKind("desktop-ddr5", 70e9, 16, "2 channels of DDR5-5600 (89.6 GB/s)"),
    HostKind("server-ddr4", 160e9, 32, "8 channels of DDR4-3200 (204.8 GB/s)"),
    HostKind("server-ddr5", 245e9, 48, "8 channels of DDR5-4800 (307.2 GB/s)"),
    HostKind("server-ddr5-12", 370e9, 64, "12 channels of DDR5-4800 (460.8 GB/s)"),
)

TOPOLOGIES = {
    "x16": "16 lanes for each GPU",
    "x8": "8 lanes for each GPU",
    "switch": "two GPUs behind each switch share 16 lanes",
    "nvlink": "16 lanes for each GPU, and NVLink between GPUs",
}
"""How GPUs hang on the host."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, however it is spelt: ``"rtx4090"``, ``"NVIDIA A100-SXM4-80GB"``.

    Raises:
        ConfigError: if there is none; it names the nearest.
    """
    found = known_gpu(name)
    if found is not None:
        return found
    keys = {_key(gpu.name): gpu.name for gpu in GPUS}
    near = difflib.get_close_matches(_key(name), keys, n=1, cutoff=0.5)
    hint = f"did you mean {keys[near[0]]}? " if near else ""
    raise ConfigError(f"no GPU {name!r}; {hint}Known: {', '.join(gpu.name for gpu in GPUS)}")


def known_gpu(name: str) -> Gpu | None:
    """Return the GPU of a name as a driver or a person gives it; None if it is not listed."""
    return _BY_KEY.get(_key(name))


def _key(name: str) -> str:
    """Letters and digits of a name, without the maker's and its brands."""
    plain = re.sub(r"nvidia|geforce|tesla|amd|instinct|\bgpu\b|[rg]tx", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)


_BY_KEY = {_key(name): gpu for gpu in GPUS for name in (gpu.name, *gpu.aliases)}


def find_host(name: str) -> HostKind:
    """Return the kind of host of a name.

    Raises:
        ConfigError: if there is none.
    """
    for kind in HOSTS:
        if kind.name == name.lower():
            return kind
    near = difflib.get_close_matches(name.lower(), [kind.name for kind in HOSTS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"no host {name!r}; {hint}Known: {', '.join(k.name for k in HOSTS)}")


def usual_host(gpu: Gpu, count: int) -> HostKind:
    """The host that such GPUs are usually found in: a desktop has lanes for two at most."""
    generation = "ddr5" if gpu.pcie >= 5 or (gpu.pcie == 4 and not gpu.server) else "ddr4"
    if gpu.server or count > 2:
        # Boards with lanes for more than two consumer GPUs are server boards, mostly older.
        generation = "ddr5" if gpu.pcie >= 5 else "ddr4"
        return find_host(f"server-{generation}")
    return find_host(f"desktop-{generation}")


def machine_of(
    gpu: Gpu,
    count: int,
    host_memory_nbytes: int,
    *,
    topology: str | None = None,
    host: HostKind | None = None,
    gpu_memory_nbytes: int | None = None,
    link_bytes_per_s: float | None = None,
) -> Machine:
    """Describe a server with ``count`` of these GPUs.

    Args:
        topology: a key of `TOPOLOGIES`; by default ``"nvlink"`` where the GPU has it and there are
            several, else ``"x16"``.
        host: what feeds them; by default the one that they are usually found in.
        gpu_memory_nbytes: bytes to use of each; by default what the driver leaves.
        link_bytes_per_s: of each GPU's link to the host and direction, instead of PCIe's.

    Raises:
        ConfigError: if the parts do not go together.
    """
    if topology is None:
        topology = "nvlink" if gpu.peer_bytes_per_s and count > 1 else "x16"
    _check_parts(gpu, count, topology, gpu_memory_nbytes)
    host = host or usual_host(gpu, count)
    link = link_bytes_per_s or PCIE_BYTES_PER_S[gpu.pcie] / (2 if topology == "x8" else 1)
    peer = gpu.peer_bytes_per_s if topology == "nvlink" else link * PCIE_PEER_SHARE
    device = Device(
        gpu.name,
        gpu_memory_nbytes or gpu.usable_nbytes,
        link,
        link,
        peer,
        TASK_OVERHEAD_S,
        gpu.memory_bytes_per_s * MEMORY_SHARE / UPDATE_TRAFFIC,
    )
    # An addition reads two operands and writes one.
    server = Host(
        host_memory_nbytes,
        host.bytes_per_s / 3,
        host.num_cores,
        memory_bytes_per_s=host.bytes_per_s,
        update_memory_factor=UPDATE_TRAFFIC,
    )
    pairs = range(0, count, 2) if topology == "switch" else ()
    switches = tuple(
        Switch(tuple(range(first, min(first + 2, count))), link, link) for first in pairs
    )
    peers: Literal["direct", "host"] = "direct" if topology == "nvlink" else "host"
    return Machine((device,) * count, server, 0.0, switches, peers)


def _check_parts(gpu: Gpu, count: int, topology: str, gpu_memory_nbytes: int | None) -> None:
    if count < 1:
        raise ConfigError(f"a machine needs at least 1 GPU, not {count}")
    if count > MOST_GPUS:
        raise ConfigError(f"a machine has at most {MOST_GPUS} GPUs, not {count}")
    if topology not in TOPOLOGIES:
        raise ConfigError(f"no topology {topology!r}; known: {', '.join(TOPOLOGIES)}")
    if topology == "nvlink" and not gpu.peer_bytes_per_s:
        raise ConfigError(f"{gpu.name} has no NVLink; choose x16, x8 or switch")
    if gpu_memory_nbytes is not None and gpu_memory_nbytes > gpu.memory_nbytes:
        has, asked = gpu.memory_nbytes / 2**30, gpu_memory_nbytes / 2**30
        raise ConfigError(f"a {gpu.name} has {has:.1f} GiB, not {asked:.1f} GiB")
