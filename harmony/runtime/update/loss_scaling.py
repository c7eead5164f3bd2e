"""Losses scaled so that gradients in fp16 do not vanish, by PyTorch's own `GradScaler`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class LossScaling:
    """What a loop does with a `GradScaler`, in the parts that a step of packs has.

    Attributes:
        scaler: PyTorch's; what it does with infinite gradients, and when it grows, is its own.
        skips: whether the optimizer is not to step, since a gradient of this step is not finite.
    """

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")
        self.skips = False
        self._looked = False
        self._known: list[_Gradients] = []  # the scaler knows them by their identities

    def scale(self) -> float:
        """What the loss is multiplied by."""
        return float(self.scaler.scale(torch.ones(())))

    def unscale(self, params: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of all parameters, and see whether they are finite."""
        self.scaler.update(self.scale())  # forgets what a step that has failed had found
        found = _Gradients([param for param in params if param.grad is not None])
        self._known = [found]
        self._looked = bool(found.param_groups[0]["params"])
        if self._looked:
            self.scaler.unscale_(found)  # type: ignore[arg-type]
            self.scaler.step(found)  # type: ignore[arg-type]
        self.skips = self._looked and not found.are_finite

    def hear(self, looked: bool, skips: bool) -> None:
        """Take over whether any process has looked at gradients, and found some infinite."""
        if (looked, skips) != (self._looked, self.skips):
            marker = nn.Parameter(torch.zeros(()))
            marker.grad = torch.full((), float("inf" if skips else 0))
            self._known.append(_Gradients([marker]))
            self.scaler.unscale_(self._known[-1])  # type: ignore[arg-type]
        self._looked, self.skips = looked, skips

    @property
    def has_looked(self) -> bool:
        """Whether this step had gradients to look at."""
        return self._looked

    def update(self) -> None:
        """Let the scale be that of the next step."""
        if self._looked:
            self.scaler.update()
        self._looked = False


class _Gradients:
    """Stands for the optimizer, whose step a `GradScaler` takes where gradients are finite."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": params}]
        self.are_finite = False

    def step(self) -> None:
        """Note that they are."""
        self.are_finite = True
