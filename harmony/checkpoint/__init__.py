"""Checkpoints of a training run, from which it goes on bit for bit."""

from __future__ import annotations

from harmony.checkpoint.training import Restored, load_training, save_training

__all__ = ["Restored", "load_training", "save_training"]
