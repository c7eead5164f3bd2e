"""Classes for other libraries, where more is to be had than by a wrapped model alone.

Nothing of these libraries is imported before its class is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from harmony.errors import ConfigError

if TYPE_CHECKING:
    from harmony.integrations.strategy import HarmonyStrategy
    from harmony.integrations.tensorboard import TensorBoardObserver
    from harmony.integrations.trainer import HarmonyTrainer
    from harmony.integrations.weights_and_biases import WandbObserver

_HOMES = {
    "HarmonyStrategy": ("harmony.integrations.strategy", "lightning", "lightning"),
    "HarmonyTrainer": ("harmony.integrations.trainer", "transformers and accelerate", "hf"),
    "TensorBoardObserver": ("harmony.integrations.tensorboard", "tensorboard", "tensorboard"),
    "WandbObserver": ("harmony.integrations.weights_and_biases", "wandb", "wandb"),
}
"""Class: its module, what it needs, and the extra that installs it."""

__all__ = ["HarmonyStrategy", "HarmonyTrainer", "TensorBoardObserver", "WandbObserver"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, needed, extra = _HOMES[name]
    try:
        return getattr(importlib.import_module(home), name)
    except ImportError as error:
        raise ConfigError(
            f"{name} needs {needed} ({error}): pip install 'harmony-train[{extra}]'"
        ) from error
