"""Checkpoints of a training run, from which it goes on bit for bit."""

from __future__ import annotations

from harmony.checkpoint.model_checkpoints import Checkpoints
from harmony.checkpoint.run import Run
from harmony.checkpoint.saving import Saving
from harmony.checkpoint.training import Restored

__all__ = ["Checkpoints", "Restored", "Run", "Saving"]
