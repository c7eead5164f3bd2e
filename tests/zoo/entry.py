"""An entry of the zoo: a model, its batches, its loss, and how exact its training has to be."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = tuple[Any, Any]
"""Inputs as `Harmony.train_step` takes them, and targets; samples along dimension 0."""

TIED = "a tied weight is read by several packs: its gradient is added up pack by pack"
"""The usual reason for a tolerance of 2e-7 instead of equal bits."""

LAYOUT = "a gradient that crosses packs has its value's memory format: sums have another order"
"""The reason where plain PyTorch hands on a channels-last gradient of a contiguous value."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: unique; what `--only` takes.
        family: heading in the table.
        shows: what makes the model worth its place, in a few words.
        build: makes the module, with random weights.
        batch: ``batch(num_samples, seed)``.
        loss: ``loss(output, targets)``; None if the module returns its loss.
        tolerance: largest difference of a gradient, relative to its largest entry; 0 means that
            all bits are equal.
        reason: why there is a tolerance.
        num_samples, microbatch: samples of a minibatch and of a microbatch.
        last_samples: samples of the last minibatch, where it is another number.
        num_packs: packs of the plan; fewer only where a model has fewer layers.
        whole_batch: compare with the loss of the whole minibatch, not with the mean of the
            microbatches' losses.
        summed: the loss is a sum over the samples: the microbatches' losses are added up.
        needs: packages beyond those that the tests install.
        slow: takes more than ten seconds.
        refused: what Harmony says where it refuses the model by name; empty where it trains.
    """

    name: str
    family: str
    shows: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    tolerance: float = 0.0
    reason: str = ""
    num_samples: int = 4
    last_samples: int = 0
    microbatch: int = 2
    num_packs: int = 4
    whole_batch: bool = False
    summed: bool = False
    needs: tuple[str, ...] = ()
    slow: bool = False
    refused: str = ""

    def make(self) -> nn.Module:
        """Return the module in train mode, the same one each time."""
        torch.manual_seed(0)
        random.seed(0)
        return self.build().train()

    def batches(self, num_steps: int) -> list[Batch]:
        """Return the minibatches of the first steps."""
        sizes = [self.num_samples] * num_steps
        sizes[-1] = self.last_samples or self.num_samples
        return [self.batch(size, 100 * step) for step, size in enumerate(sizes)]

    def missing(self) -> str | None:
        """Say which package is not there; None if the entry can run."""
        for package in self.needs:
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken installation is as good as none
                return f"{package} cannot be imported: {error}"
        return None
