"""Harmony: train PyTorch models larger than the memory of all GPUs of one server, exactly.

The public names; each is imported when it is first used, so that planning needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmony.errors import (
        CaptureError,
        ConfigError,
        DoesNotFitError,
        ExecutionError,
        HarmonyError,
        PlanError,
        RaceError,
        ScheduleError,
        VirtualGPUError,
    )
    from harmony.module import Harmony
    from harmony.planner.plan import Plan
    from harmony.runtime.randomness import microbatch_seed
    from harmony.runtime.vgpu import virtual_gpus

__version__ = "0.1.0"

_HOMES = {
    "Harmony": "harmony.module",
    "Plan": "harmony.planner.plan",
    "microbatch_seed": "harmony.runtime.randomness",
    "virtual_gpus": "harmony.runtime.vgpu",
    "HarmonyError": "harmony.errors",
    "ConfigError": "harmony.errors",
    "CaptureError": "harmony.errors",
    "PlanError": "harmony.errors",
    "DoesNotFitError": "harmony.errors",
    "ScheduleError": "harmony.errors",
    "ExecutionError": "harmony.errors",
    "RaceError": "harmony.errors",
    "VirtualGPUError": "harmony.errors",
}

__all__ = [
    "CaptureError",
    "ConfigError",
    "DoesNotFitError",
    "ExecutionError",
    "Harmony",
    "HarmonyError",
    "Plan",
    "PlanError",
    "RaceError",
    "ScheduleError",
    "VirtualGPUError",
    "__version__",
    "microbatch_seed",
    "virtual_gpus",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'harmony' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
