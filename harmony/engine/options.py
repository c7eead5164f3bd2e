"""What a Harmony model was asked for, checked and parsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harmony.core.options import Watch
from harmony.engine.call_kind import CallKind
from harmony.engine.precision import FP32, Precision
from harmony.errors import NonFiniteError
from harmony.planner.ir.plan import Plan
from harmony.runtime.step.finite import check_finite
from harmony.runtime.update.optimizer import Groups, OptimizerFactory, PackOptimizer


@dataclass
class EngineOptions:
    """The wrapper's arguments, checked and parsed. A checkpoint brings its own seed."""

    optimizer: OptimizerFactory | None = None
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)
    param_groups: Groups | Callable[[nn.Module], Groups] | None = None
    max_grad_norm: float | None = None
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    mode: str = "auto"
    microbatch_size: int | None = None
    device_memory_nbytes: int | None = None
    host_memory_nbytes: int | None = None
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)
    plan: Plan | None = None
    activations: str = "auto"
    updates: str = "auto"
    overlap_updates: bool = False
    replan: bool = True
    seed: int = 0
    precision: Precision = FP32
    watch: Watch | None = None
    detect_nonfinite: bool = False

    def groups_of(self, net: nn.Module) -> Groups | None:
        """The parameter groups of a module, as it is now."""
        groups = self.param_groups
        return groups(net) if callable(groups) else groups

    def check_finite(self, net: nn.Module, loss: torch.Tensor, minibatch: int) -> None:
        """Refuse the loss and the gradients of a step that no schedule runs as a whole.

        Raises:
            NonFiniteError: if that is looked for, and found.
        """
        if self.detect_nonfinite:
            try:
                check_finite([((0, minibatch), loss)], dict(net.named_parameters()))
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error}. Nothing was updated. Which operation made it is only found where "
                    "a step is planned as a whole; torch.autograd.set_detect_anomaly helps here"
                ) from None

    def batch_dims_of(self, kind: CallKind) -> dict[str, int | None]:
        """The batch dimensions of the inputs of a kind of call: only `train_step` has targets."""
        return {
            name: dim
            for name, dim in self.batch_dims.items()
            if kind is CallKind.TRAIN_STEP or not name.startswith("targets")
        }

    def loss_name(self, kind: CallKind) -> str:
        """The loss function's name for a kind of call; empty where the model makes its loss."""
        loss = self.loss_fn if kind is CallKind.TRAIN_STEP else None
        return "" if loss is None else getattr(loss, "__name__", type(loss).__name__)

    def make_optimizer(self, net: nn.Module) -> PackOptimizer | None:
        """The optimizer of a module's parameters; None if the user has one of their own."""
        if self.optimizer is None:
            return None
        made = PackOptimizer(
            dict(net.named_parameters()),
            self.optimizer,
            self.optimizer_kwargs,
            self.groups_of(net),
            self.max_grad_norm,
        )
        made.looks_first = self.detect_nonfinite
        return made
