"""What is recorded or run: a module's forward, and the loss if the step has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmony.errors import ConfigError

Loss = Callable[[Any, Any], torch.Tensor]
CallLoss = Callable[[Loss, Any, Any], torch.Tensor]
"""Calls a loss function, and sees what it does."""


@dataclass(frozen=True)
class Program:
    """What is recorded: the forward, and the loss if the step has one.

    Attributes:
        loss: maps ``(output, targets)`` to the scalar loss.
        output_loss: whether the model returns its loss itself.
    """

    loss: Loss | None = None
    output_loss: bool = False

    @property
    def has_loss(self) -> bool:
        """Whether the result is the scalar loss."""
        return self.output_loss or self.loss is not None

    def __call__(
        self,
        net: nn.Module,
        args: Any,
        kwargs: Any,
        targets: Any,
        call_loss: CallLoss | None = None,
    ) -> Any:
        """Run it; the loss by ``call_loss``, if that is given."""
        out = net(*args, **kwargs)
        if self.loss is not None:
            call = call_loss or (lambda loss, out, targets: loss(out, targets))
            return _scalar(call(self.loss, out, targets), "the loss function returned")
        if self.output_loss:
            return _scalar(_loss_of(out), "output_loss is set, but the model returned")
        return out


def _loss_of(out: Any) -> Any:
    if isinstance(out, Mapping):
        return out.get("loss")
    if isinstance(out, (tuple, list)):
        return out[0] if out else None
    return out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)


def _scalar(loss: Any, what: str) -> torch.Tensor:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss.reshape(()) if loss.dim() else loss
    raise ConfigError(f"{what} {_kind(loss)} where a scalar tensor was expected as the loss")


def _kind(loss: Any) -> str:
    if isinstance(loss, torch.Tensor):
        return f"a tensor of shape {tuple(loss.shape)} (take its mean())"
    if isinstance(loss, (tuple, list)):
        return f"a {type(loss).__name__} of {len(loss)} (return the loss alone)"
    if isinstance(loss, (int, float)):
        return "a number (leave item() out, the gradients need the tensor)"
    return f"a {type(loss).__name__}"
