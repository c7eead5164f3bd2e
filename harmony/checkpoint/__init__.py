"""Checkpoints of a training run, from which it goes on bit for bit."""

from __future__ import annotations

from harmony.checkpoint.attributes import Attributes
from harmony.checkpoint.run import Run
from harmony.checkpoint.saving import Saving
from harmony.checkpoint.store import step_name
from harmony.checkpoint.training import Restored, load_training, own_part, part_of, snapshot
from harmony.checkpoint.writing import said_by_name

__all__ = [
    "Attributes",
    "Restored",
    "Run",
    "Saving",
    "load_training",
    "own_part",
    "part_of",
    "said_by_name",
    "snapshot",
    "step_name",
]
