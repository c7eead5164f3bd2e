"""Checkpoints of a training run, from which it goes on bit for bit."""

from __future__ import annotations

from harmony.checkpoint.attributes import Attributes
from harmony.checkpoint.run import Run
from harmony.checkpoint.training import Restored, load_training, save_training

__all__ = ["Attributes", "Restored", "Run", "load_training", "save_training"]
