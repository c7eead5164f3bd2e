"""Classes for other libraries, where more is to be had than by a wrapped model alone.

Nothing of these libraries is imported before its class is asked for.
"""

from __future__ import annotations

from typing import Any

from harmony.errors import ConfigError

__all__ = ["HarmonyTrainer"]


def __getattr__(name: str) -> Any:
    if name != "HarmonyTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from harmony.integrations.trainer import HarmonyTrainer
    except ImportError as error:
        raise ConfigError(
            f"HarmonyTrainer needs transformers and accelerate ({error}): "
            "pip install 'harmony[hf]'"
        ) from error
    return HarmonyTrainer
