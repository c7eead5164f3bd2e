"""Harmony: train PyTorch models larger than the memory of all GPUs of one server, exactly.

The public names; each is imported when it is first used, so that planning needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmony.bigmodel import materialise, meta_init
    from harmony.errors import (
        CaptureError,
        ConfigError,
        DoesNotFitError,
        ExecutionError,
        HarmonyError,
        PlanError,
        RaceError,
        RecomputeError,
        ScheduleError,
        VirtualGPUError,
    )
    from harmony.module import Harmony
    from harmony.planner.plan import Plan
    from harmony.pretrained import load_pretrained
    from harmony.runtime.randomness import microbatch_seed, seed_microbatch
    from harmony.runtime.vgpu import virtual_gpus

__version__ = "0.1.0"

_HOMES = {
    "Harmony": "harmony.module",
    "Plan": "harmony.planner.plan",
    "load_pretrained": "harmony.pretrained",
    "materialise": "harmony.bigmodel",
    "meta_init": "harmony.bigmodel",
    "microbatch_seed": "harmony.runtime.randomness",
    "seed_microbatch": "harmony.runtime.randomness",
    "virtual_gpus": "harmony.runtime.vgpu",
    "HarmonyError": "harmony.errors",
    "ConfigError": "harmony.errors",
    "CaptureError": "harmony.errors",
    "PlanError": "harmony.errors",
    "DoesNotFitError": "harmony.errors",
    "ScheduleError": "harmony.errors",
    "ExecutionError": "harmony.errors",
    "RaceError": "harmony.errors",
    "RecomputeError": "harmony.errors",
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
    "RecomputeError",
    "ScheduleError",
    "VirtualGPUError",
    "__version__",
    "load_pretrained",
    "materialise",
    "meta_init",
    "microbatch_seed",
    "seed_microbatch",
    "virtual_gpus",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'harmony' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
