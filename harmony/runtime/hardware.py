"""Which devices a model trains on: what the caller, the command line and the machine say."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType

import torch

from harmony.core.options import current_options
from harmony.core.units import format_bytes, parse_bytes_with_unit
from harmony.core.warn import warn
from harmony.errors import ConfigError
from harmony.runtime import native
from harmony.runtime.device import available_devices

Devices = int | str | torch.device | Sequence[str | torch.device] | None

DEFAULT_VIRTUAL_MEMORY = "64MiB"


def choose_devices(
    devices: Devices, device_memory: str | int | None, share: tuple[int, int] = (0, 1)
) -> list[torch.device]:
    """Return the devices to train on; starts virtual ones on a machine without a GPU.

    Args:
        devices: how many, of the share, or which.
        device_memory: bytes of a virtual one.
        share: number of this process on the server, and how many share its GPUs. Virtual GPUs
            are each process's own.

    What the command line says (`harmony-run --gpus`) comes before what the script says.

    Raises:
        ConfigError: if there are not that many, or none was asked for.
    """
    options = current_options()
    wanted = devices if options.gpus is None else options.gpus
    if options.gpu is not None:  # for GPUs that are not there; here nothing is computed
        wanted = 1
    if not isinstance(wanted, (int, NoneType)):
        named = [wanted] if isinstance(wanted, (str, torch.device)) else wanted
        return _named_devices(named, device_memory)
    if wanted is not None and wanted < 1:
        raise ConfigError(f"devices={wanted}: at least one device is needed")
    found = available_devices()
    if not found:
        _start_virtual(wanted or 1, device_memory)
        found = available_devices()
    found = _part_of(_with_kernels(found), share)
    if wanted is not None and wanted > len(found):
        raise ConfigError(
            f"{wanted} devices asked for, but there are {len(found)}: "
            f"{', '.join(map(str, found))}. Ask for {len(found)}, or use harmony-run --virtual"
        )
    return found[:wanted]


def _part_of(found: list[torch.device], share: tuple[int, int]) -> list[torch.device]:
    """The GPUs of one of several processes on a server: as many as the others have, or one more.

    Raises:
        ConfigError: if there is none for it.
    """
    index, count = share
    if count == 1 or is_virtual(found):
        return found
    low, high = (len(found) * i // count for i in (index, index + 1))
    if len(found) < count:
        raise ConfigError(
            f"{count} processes on this server (LOCAL_WORLD_SIZE) and {len(found)} GPUs visible: "
            f"start at most {len(found)}, as torchrun --nproc-per-node {len(found)}, or name "
            "this process's own with devices=['cuda:0'] where the launcher hides the others"
        )
    return found[low:high]


def _named_devices(
    names: Sequence[str | torch.device], device_memory: str | int | None
) -> list[torch.device]:
    try:
        chosen = [torch.device(name) for name in names]
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0][:120]
        raise ConfigError(f"devices={str(names)[:80]}: {why}") from None
    if not chosen:
        raise ConfigError("devices=[]: at least one device is needed")
    if any(device.type == "vgpu" for device in chosen) and not available_devices():
        _start_virtual(1 + max(device.index or 0 for device in chosen), device_memory)
    chosen = [torch.device(device.type, device.index or 0) for device in chosen]
    twice = sorted({str(device) for device in chosen if chosen.count(device) > 1})
    if twice:
        raise ConfigError(f"devices={str(names)[:80]}: {twice[0]} is named twice; name each once")
    found = available_devices()
    absent = [str(device) for device in chosen if device not in found]
    if absent:
        there = ", ".join(map(str, found)) or "none"
        if found and found[0].type not in {device.type for device in chosen}:
            there += ", and PyTorch uses one kind of device in a process: start one without them"
        remedy = "Name those, or leave devices= out"
        raise ConfigError(f"devices={absent}: there are {there}. {remedy}")
    return _with_kernels(chosen, named=True)


def _with_kernels(devices: list[torch.device], *, named: bool = False) -> list[torch.device]:
    """Leave out GPUs that PyTorch has no kernels for; refuse them if they were named."""
    unusable = [device for device in devices if not native.can_run_kernels(device)]
    if not unusable:
        return devices
    capability = torch.cuda.get_device_capability(unusable[0])
    why = (
        f"{', '.join(map(str, unusable))} ({native.product_name(unusable[0])}, compute capability "
        f"{capability[0]}.{capability[1]}) cannot run this PyTorch, which has kernels for "
        f"{', '.join(torch.cuda.get_arch_list())}"
    )
    usable = [device for device in devices if device not in unusable]
    if named or not usable:
        raise ConfigError(f"{why}. Use other GPUs, or a PyTorch that was built for them")
    warn(f"{why}: left out")
    return usable


def memory_limit(device_memory: str | int | None) -> int | None:
    """Bytes that Harmony may use of each device; None means all of it."""
    options = current_options()
    if options.gpu_memory_nbytes is not None:
        return options.gpu_memory_nbytes
    return None if device_memory is None else _size_of(device_memory)


def _size_of(device_memory: str | int) -> int:
    try:
        return parse_bytes_with_unit(device_memory)
    except ConfigError as error:
        raise ConfigError(f"device_memory: {error}") from None


def _start_virtual(count: int, device_memory: str | int | None) -> None:
    from harmony.vgpu.api import virtual_gpus  # builds the device, so only where it is used

    limit = _size_of(device_memory or DEFAULT_VIRTUAL_MEMORY)
    virtual_gpus(count=count, memory=limit)
    warn(
        f"no GPU found: training on {count} virtual GPU{'s' * (count > 1)} of "
        f"{format_bytes(limit)} each, which compute on the CPU",
    )


def is_virtual(devices: Sequence[torch.device]) -> bool:
    """Whether the devices are virtual GPUs."""
    return native.is_virtual(devices[0])
