"""What earlier runs measured on this machine, kept on disk so that a start need not measure again.

One JSON file for each machine (its links), each model on it (seconds of its layers) and each
optimizer, in `harmony.core.files.cache_folder`. The key of a file holds all
that its figures depend on and software can see: devices, driver, CPU, threads, the versions of
torch and of Harmony, and the code of the layers. How much memory is free is never kept.

``HARMONY_MEASUREMENTS=off`` (or ``harmony-run --no-cache``) turns it off, ``=on`` turns it on.
Otherwise it is on, except on virtual GPUs outside of harmony-run: how fast those are depends on
what else the CPU does just then, and short programs and tests should measure it.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn

from harmony.core.files import DAMAGED, amount, cache_folder, check_types, read_json, write_json
from harmony.core.machine import Machine
from harmony.core.options import current_options
from harmony.core.version import __version__
from harmony.errors import ConfigError, HarmonyError
from harmony.profiling.layer_times import KnownTimes
from harmony.profiling.server import usable_nbytes
from harmony.profiling.update_times import UpdateCost
from harmony.runtime import native
from harmony.runtime.device import DeviceContext
from harmony.runtime.host.limits import available_host_nbytes
from harmony.runtime.update.native_step import describe
from harmony.runtime.update.optimizer import PackOptimizer

T = TypeVar("T")

VERSION = 3
VARIABLE = "HARMONY_MEASUREMENTS"


def open_cache(
    contexts: Sequence[DeviceContext], say: Callable[[str], None]
) -> MeasureCache | None:
    """Return the cache of these devices' measurements; None where it is off.

    Args:
        say: hears of a file that cannot be used.

    Raises:
        ConfigError: if the variable is neither on nor off.
    """
    wanted = os.environ.get(VARIABLE, "").lower()
    if wanted not in ("", "on", "off", "1", "0"):
        raise ConfigError(f"{VARIABLE}={wanted}: it is on or off")
    options = current_options()
    is_virtual = native.is_virtual(contexts[0].device)
    usual = options.active or not is_virtual
    if wanted in ("off", "0") or not options.cache or (not wanted and not usual):
        return None
    return MeasureCache(cache_folder(), machine_identity(contexts), say)


class MeasureCache:
    """Reads and writes measurements; one that cannot be read or written is done without."""

    def __init__(self, folder: Path, machine: str, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._machine = machine
        self._say = say

    def times(self, net: nn.Module) -> KnownTimes:
        """Seconds of layers that were measured of such a model before."""
        data = self._read("layers", code_identity(net), _read_times)
        return KnownTimes() if data is None else data

    def keep_times(self, net: nn.Module, known: KnownTimes) -> None:
        """Keep seconds of layers for the next run."""
        rows = [[*key, *seconds] for key, seconds in sorted(known.seconds.items())]
        data = {"cpu_share": known.cpu_share, "seconds": rows}
        self._write("layers", code_identity(net), data)

    def machine(
        self,
        contexts: Sequence[DeviceContext],
        memory_nbytes: int | None,
        host_memory_nbytes: int | None,
        measure: Callable[[], Machine],
        key: str = "",
    ) -> Machine:
        """Return the machine as it was measured before, with the memory of now; else measure it.

        Args:
            memory_nbytes, host_memory_nbytes: as for `harmony.profiling.server.measure_machine`.
            key: what else its figures depend on.
        """
        name = f"{memory_nbytes} {key}"
        machine = self._read("machine", name, Machine.from_json)
        if machine is None or machine.num_devices != len(contexts):
            machine = measure()
            self._write("machine", name, machine.to_json())
            return machine
        devices = tuple(
            replace(device, memory_nbytes=usable_nbytes(context, memory_nbytes))
            for device, context in zip(machine.devices, contexts, strict=True)
        )
        host_nbytes = host_memory_nbytes or available_host_nbytes()
        host = replace(machine.host, memory_nbytes=host_nbytes)
        return replace(machine, devices=devices, host=host)

    def update(self, optimizer: PackOptimizer, measure: Callable[[], UpdateCost]) -> UpdateCost:
        """Return what the optimizer costs, as it was measured before; else measure it.

        Only optimizers of torch.optim are told apart by their name.
        """
        name = optimizer_identity(optimizer)
        if not name:
            return measure()
        cost = self._read("update", name, _read_update)
        if cost is None:
            cost = measure()
            self._write("update", name, dict(cost.__dict__))
        return cost

    def _path(self, kind: str, name: str) -> Path:
        text = f"{VERSION}\n{self._machine}\n{name}"
        return self._folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def _read(self, kind: str, name: str, parse: Callable[[Any], T]) -> T | None:
        path = self._path(kind, name)
        try:
            return parse(read_json(path, "cache")) if path.exists() else None
        except (OSError, HarmonyError, *DAMAGED) as error:
            self._say(f"measuring again: the cache {path} cannot be read ({error})")
            return None

    def _write(self, kind: str, name: str, data: object) -> None:
        path = self._path(kind, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(data, path, "what was measured")
        except (OSError, HarmonyError) as error:
            self._say(f"{error}: the next run has to measure again")


def _read_times(data: Any) -> KnownTimes:
    share = data["cpu_share"]
    known = KnownTimes(cpu_share=None if share is None else amount(share))
    for signature, num_samples, *seconds in data["seconds"]:
        forward_s, backward_s, products_s = map(amount, seconds)
        check_types((signature, num_samples), tuple[str, int])
        known.seconds[signature, num_samples] = forward_s, backward_s, products_s
    return known


def _read_update(data: Any) -> UpdateCost:
    state = {str(kind): amount(nbytes) for kind, nbytes in data["state_nbytes"].items()}
    names = ("seconds", "device_bytes_per_s", "temporary_nbytes")
    seconds, rate, temporary = (amount(data[name], name) for name in names)
    return UpdateCost(seconds, state, rate, temporary, bool(data["alike"]))


def machine_identity(contexts: Sequence[DeviceContext]) -> str:
    """All of the machine and of torch's settings that times depend on, as text."""
    return repr(
        {
            "harmony": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "devices": [native.identity(context.device) for context in contexts],
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        }
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def code_identity(net: nn.Module) -> str:
    """Text that changes when the code of the model's forward does.

    Layers of equal work have equal signatures, but these do not see what a forward's Python does.
    """
    texts = set()
    for kind in {type(module) for module in net.modules()}:
        forward = getattr(kind.forward, "__code__", None)
        texts.add(f"{kind.__module__}.{kind.__qualname__} {_code_text(forward)}")
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()


def _code_text(code: CodeType | None) -> str:
    """What a function does, without where it stands in which file."""
    if code is None:
        return ""
    constants = [
        _code_text(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def optimizer_identity(optimizer: PackOptimizer) -> str:
    """Text that is equal for optimizers of equal cost; empty where that cannot be told.

    Options count but for learning rates, and of the parameters their kinds and the largest one.
    """
    kind = type(optimizer.full)
    if not kind.__module__.startswith("torch.optim"):
        return ""
    options, params = set(), []
    for group in optimizer.full.param_groups:
        held = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
        options.add(repr(sorted(held.items())))
        params += [(str(p.dtype), tuple(p.shape)) for p in group["params"]]
    kinds = sorted({(dtype, len(shape)) for dtype, shape in params})
    largest = max(params, key=lambda param: math.prod(param[1]))
    waits = optimizer.waits is not None
    options.add(describe(optimizer.full))
    return f"{kind.__module__}.{kind.__qualname__} {sorted(options)} {kinds} {largest} {waits}"
