"""GPUs and links: what NVML says of them, and what earlier runs have measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from harmony.core.files import DAMAGED, cache_folder, read_json
from harmony.core.machine import Machine
from harmony.core.units import format_bytes, format_rate
from harmony.doctor.findings import Finding, error, ok, warning
from harmony.errors import HarmonyError

_PINNED_NBYTES = 64 * 2**20

SHOWN = 4
"""Measured machines that are shown, the newest first."""


def look_at_gpus() -> Iterator[Finding]:
    """Every GPU that the driver knows, and whether PyTorch can use it."""
    nvml = _nvml()
    if nvml is None:
        yield from _without_nvml()
        return
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    yield ok("driver", f"NVIDIA {driver}", version=driver)
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    for index, handle in enumerate(handles):
        yield _gpu(nvml, f"GPU {index}", handle)
    for (a, one), (b, two) in combinations(enumerate(handles), 2):
        yield ok(f"GPU {a} - GPU {b}", _link_between(nvml, one, two))
    yield from _as_torch_sees_them(len(handles))
    yield from _other_numbers(nvml, handles)


def _other_numbers(nvml: Any, handles: Sequence[Any]) -> Iterator[Finding]:
    """Which GPU each device of PyTorch is, where its numbers are not the driver's.

    CUDA_VISIBLE_DEVICES leaves some out, and CUDA counts the fastest first where kinds differ.
    """
    import torch

    numbers = {
        _text(name).removeprefix("GPU-"): index
        for index, handle in enumerate(handles)
        if (name := _asked(nvml, "nvmlDeviceGetUUID", handle)) is not None
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ids = (str(torch.cuda.get_device_properties(index).uuid) for index in range(count))
    known = {index: numbers[name] for index, name in enumerate(ids) if name in numbers}
    if any(index != number for index, number in known.items()):
        text = ", ".join(f"cuda:{index} is GPU {number}" for index, number in known.items())
        yield ok("numbers", text, **{f"cuda:{index}": number for index, number in known.items()})


def _nvml() -> Any:
    """NVML, ready for questions; None where there is no driver."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
    except Exception:  # no package, no library, no driver: each has an error of its own
        return None
    return pynvml


def _without_nvml() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        remedy = "pip install nvidia-ml-py, so that NVLink is known and GPUs can be looked at"
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            yield warning(f"GPU {index}", f"{name}; NVML does not answer", remedy)
        return
    remedy = "none is needed to try Harmony; for real ones install NVIDIA's driver"
    yield warning("GPUs", "no NVIDIA GPU found: training runs on virtual GPUs", remedy)


def _gpu(nvml: Any, name: str, handle: Any) -> Finding:
    product = _text(nvml.nvmlDeviceGetName(handle))
    memory = _asked(nvml, "nvmlDeviceGetMemoryInfo", handle)  # one that shares the host's has none
    figures: dict[str, Any] = {"product": product}
    text = product
    if memory is not None:
        figures |= {"free_nbytes": int(memory.free), "total_nbytes": int(memory.total)}
        text += f", {format_bytes(memory.free)} of {format_bytes(memory.total)} free"
    now, most = (
        tuple(_asked(nvml, f"nvmlDeviceGet{which}PcieLink{what}", handle) for what in _LINK)
        for which in ("Curr", "Max")
    )
    if None not in (*now, *most):
        figures |= {"pcie": now, "pcie_most": most}
        text += f", PCIe {now[0]} x{now[1]} (of {most[0]} x{most[1]})"
    broken = _asked(nvml, "nvmlDeviceGetTotalEccErrors", handle, 1, 0)  # uncorrected, volatile
    if broken:
        remedy = "nvidia-smi --gpu-reset, or replace it: its memory gives wrong values"
        return error(name, f"{text}; {broken} memory errors that ECC could not mend", remedy)
    if None not in (*now, *most) and now[1] < most[1]:  # the generation falls when it is idle
        remedy = "a link of fewer lanes is slower by as much: another slot, riser or setting"
        return warning(name, text, remedy, **figures)
    if memory is not None and memory.free < memory.total // 2:
        remedy = "other programs hold its memory (nvidia-smi shows which): end them"
        return warning(name, text, remedy, **figures)
    return ok(name, text, **figures)


_LINK = ("Generation", "Width")


def _asked(nvml: Any, question: str, *words: Any) -> Any:
    """What NVML answers; None where a GPU or a driver does not know the question."""
    try:
        return getattr(nvml, question)(*words)
    except Exception:
        return None


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _link_between(nvml: Any, one: Any, two: Any) -> str:
    kind = getattr(nvml, "NVML_P2P_CAPS_INDEX_NVLINK", 2)
    if _asked(nvml, "nvmlDeviceGetP2PStatus", one, two, kind) == 0:
        return "NVLink"
    levels = {0: "one board", 10: "one PCIe switch", 20: "several PCIe switches"}
    levels |= {30: "the host bridge", 40: "the NUMA node", 50: "the link between CPU sockets"}
    level = _asked(nvml, "nvmlDeviceGetTopologyCommonAncestor", one, two)
    return f"PCIe, joined by {levels.get(level, 'what NVML does not say')}"


def _as_torch_sees_them(present: int) -> Iterator[Finding]:
    import torch

    from harmony.runtime import native

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0 and present:
        built = torch.version.cuda
        remedy = (
            f"the driver is too old for CUDA {built}, or CUDA_VISIBLE_DEVICES hides them"
            if built
            else "this PyTorch was built without CUDA: install one with it (pytorch.org)"
        )
        yield error("torch.cuda", f"PyTorch sees none of {present} GPUs", remedy)
        return
    devices = [torch.device("cuda", index) for index in range(count)]
    unusable = [str(device) for device in devices if not native.can_run_kernels(device)]
    if unusable:
        remedy = f"it has kernels for {', '.join(torch.cuda.get_arch_list())}: install another"
        text = f"this PyTorch has no kernels for {', '.join(unusable)}"
        yield warning("torch.cuda", text, remedy)
    elif devices:
        yield ok("torch.cuda", f"PyTorch sees {count} of {present} GPUs", count=count)
        yield _pinning(devices[0])


def _pinning(device: Any) -> Finding:
    """Whether host memory can be page-locked for a GPU, tried with a little of it."""
    import torch

    from harmony.runtime import native

    memory = torch.empty(_PINNED_NBYTES, dtype=torch.uint8)
    why = native.pin_range(device, memory.data_ptr(), memory.nbytes)
    if why is None:
        native.unpin_range(device, memory.data_ptr())
        return ok("pinning", f"{format_bytes(memory.nbytes)} of host memory could be page-locked")
    remedy = "ulimit -l unlimited (docker run --ulimit memlock=-1): copies take twice as long"
    return warning("pinning", f"host memory cannot be page-locked: {why}", remedy)


def look_at_measured_links() -> Iterator[Finding]:
    """What earlier runs have measured of links and host memory, and kept."""
    folder = cache_folder()
    paths = sorted(folder.glob("machine-*.json"), key=lambda path: -path.stat().st_mtime)
    if not paths:
        yield ok("measured links", "none yet: the first run of a model measures and keeps them")
    for path in paths[:SHOWN]:
        try:
            machine = Machine.from_json(read_json(path, "cache"))
        except (OSError, HarmonyError, *DAMAGED) as failure:
            text = f"{path.name} cannot be read: {failure}"
            yield warning("measured links", text, f"rm {path}: it is measured again then")
            continue
        yield ok("measured links", _links(machine), file=str(path), **machine.to_json())


def _links(machine: Machine) -> str:
    """The rates of a machine's slowest links."""
    devices = machine.devices
    h2d, d2h, p2p = (
        format_rate(min(getattr(device, f"{way}_bytes_per_s") for device in devices))
        for way in ("h2d", "d2h", "p2p")
    )
    kind = devices[0].name.partition(":")[0]
    return f"{len(devices)} x {kind}, the slowest: in {h2d}, out {d2h}, to another {p2p}"
