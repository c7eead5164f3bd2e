"""Harmony: train PyTorch models larger than the memory of all GPUs of one server, exactly.

The public names; each is imported when it is first used, so that planning needs no torch.
"""

from __future__ import annotations

import importlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmony.capture.replay.kept_types import keep_fp32
    from harmony.checkpoint.run import Run
    from harmony.core.version import __version__
    from harmony.errors import (
        ArgumentError,
        CaptureError,
        ConfigError,
        DeviceLostError,
        DoesNotFitError,
        ExecutionError,
        HarmonyError,
        HarmonyWarning,
        NonFiniteError,
        NotSavedError,
        PeerError,
        PlanError,
        RaceError,
        RecomputeError,
        ScheduleError,
        VirtualGPUError,
    )
    from harmony.module import Harmony
    from harmony.planner.ir.plan import Plan
    from harmony.report.progress import Progress
    from harmony.report.session import ModelRecord, Observer, StepStats
    from harmony.runtime.step.randomness import microbatch_seed, seed_microbatch
    from harmony.vgpu.api import virtual_gpus
    from harmony.weights.meta_init import materialise, meta_init
    from harmony.weights.pretrained import load_pretrained

_HOMES = {
    "__version__": "harmony.core.version",
    "Harmony": "harmony.module",
    "Run": "harmony.checkpoint.run",
    "Plan": "harmony.planner.ir.plan",
    "ModelRecord": "harmony.report.session",
    "Observer": "harmony.report.session",
    "Progress": "harmony.report.progress",
    "StepStats": "harmony.report.session",
    "keep_fp32": "harmony.capture.replay.kept_types",
    "load_pretrained": "harmony.weights.pretrained",
    "materialise": "harmony.weights.meta_init",
    "meta_init": "harmony.weights.meta_init",
    "microbatch_seed": "harmony.runtime.step.randomness",
    "seed_microbatch": "harmony.runtime.step.randomness",
    "virtual_gpus": "harmony.vgpu.api",
    "HarmonyError": "harmony.errors",
    "HarmonyWarning": "harmony.errors",
    "ConfigError": "harmony.errors",
    "ArgumentError": "harmony.errors",
    "CaptureError": "harmony.errors",
    "PlanError": "harmony.errors",
    "DeviceLostError": "harmony.errors",
    "DoesNotFitError": "harmony.errors",
    "ScheduleError": "harmony.errors",
    "ExecutionError": "harmony.errors",
    "RaceError": "harmony.errors",
    "NonFiniteError": "harmony.errors",
    "NotSavedError": "harmony.errors",
    "PeerError": "harmony.errors",
    "RecomputeError": "harmony.errors",
    "VirtualGPUError": "harmony.errors",
}

__all__ = [
    "ArgumentError",
    "CaptureError",
    "ConfigError",
    "DeviceLostError",
    "DoesNotFitError",
    "ExecutionError",
    "Harmony",
    "HarmonyError",
    "HarmonyWarning",
    "ModelRecord",
    "NonFiniteError",
    "NotSavedError",
    "Observer",
    "PeerError",
    "Plan",
    "PlanError",
    "Progress",
    "RaceError",
    "RecomputeError",
    "Run",
    "ScheduleError",
    "StepStats",
    "VirtualGPUError",
    "__version__",
    "keep_fp32",
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
    before = random.getstate()  # rich draws a number when it is imported: it is not the script's
    try:
        return getattr(importlib.import_module(home), name)
    finally:
        random.setstate(before)


def __dir__() -> list[str]:
    return sorted(__all__)
