"""What a Harmony model was asked for, checked and parsed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harmony.core.files import check_types
from harmony.core.options import ACTIVATIONS, MODES, UPDATES, WATCHDOG, Watch, current_options
from harmony.engine.call_key import CallKind
from harmony.engine.precision import FP32, Precision
from harmony.errors import ConfigError, NonFiniteError
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import load_plan
from harmony.runtime.peers.group import PeerGroup
from harmony.runtime.peers.owners import Owners
from harmony.runtime.step.finite import check_finite
from harmony.runtime.update.loss_scaling import LossScaling
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
    peers: PeerGroup | None = None
    owners: Owners | None = None

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
        made.is_shared = self.peers is not None
        made.is_sharded = self.owners is not None
        made.check_shardable()
        if self.precision.dtype is torch.float16:
            made.scaling = LossScaling()
        return made


def pinned_plan(plan: Plan | str | Path | None) -> Plan | None:
    """The plan to train by; what the command line says comes before what the script says."""
    chosen = current_options().plan or plan
    return load_plan(Path(chosen)) if isinstance(chosen, (str, Path)) else chosen


def watch_of(watchdog: float | str | None) -> Watch | None:
    """What is watched; what the environment says comes behind what the script says."""
    if watchdog is not None:
        return Watch.of(watchdog)
    try:
        return Watch.of(os.environ.get(WATCHDOG))
    except ConfigError as error:
        raise ConfigError(f"the variable {WATCHDOG}: {error}") from None


def check_options(
    mode: object, microbatch_size: object, activations: object, updates: object
) -> None:
    """Refuse options that make no sense, before anything is made.

    Raises:
        ConfigError: naming the option and what it can be.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    if microbatch_size != "auto" and (not isinstance(microbatch_size, int) or microbatch_size < 1):
        raise ConfigError(f"microbatch_size={microbatch_size!r}: a positive number or 'auto'")
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations={activations!r}: choose 'auto' or 'recompute'")
    if updates not in UPDATES:
        raise ConfigError(f"updates={updates!r}: choose 'auto' or 'host'")


def check_loss(loss_fn: object) -> None:
    """Refuse a loss that is a class, whose object a call would make in the place of a loss.

    Raises:
        ConfigError: naming it.
    """
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        name = loss_fn.__name__
        raise ConfigError(f"loss_fn={name} is a class; give an object of it: loss_fn={name}()")
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigError(f"loss_fn={str(loss_fn)[:80]}: a function of the output and the targets")


def check_nonfinite(detects: bool, precision: str) -> None:
    """Refuse to look for what is expected: steps of fp16 whose gradients are not finite.

    Raises:
        ConfigError: saying so.
    """
    if detects and precision == "fp16":
        raise ConfigError(
            'detect_nonfinite=True with precision="fp16": gradients that are not finite are '
            "expected there, such a step is skipped and the loss scaled by less. Leave one out"
        )


def check_shards(
    shards: object, process_group: object, optimizer: object, overlap_updates: bool
) -> None:
    """Refuse to share out the optimizer's state where that makes no sense.

    Raises:
        ConfigError: naming what is missing, or in the way.
    """
    if not isinstance(shards, bool):
        raise ConfigError(f"shard_optimizer_state={str(shards)[:80]}: True or False")
    if shards and process_group is None:
        raise ConfigError(
            "shard_optimizer_state=True without process_group=: the state is shared out over the "
            "processes of a group, as torch.distributed.group.WORLD"
        )
    if shards and optimizer is None:
        raise ConfigError(
            "shard_optimizer_state=True without optimizer=: your own optimizer has its state. Use "
            "torch.distributed.optim.ZeroRedundancyOptimizer around it"
        )
    if shards and overlap_updates:
        raise ConfigError(
            "shard_optimizer_state=True with overlap_updates=True: an update that is left to the "
            "next step is made when this process first reads the parameter, but all processes "
            "have to take part in one that is shared out. Leave one of them out"
        )


def check_types_of(optimizer_kwargs: object, batch_dims: object, seed: object) -> None:
    """Refuse options of other types than they can have.

    Raises:
        ConfigError: naming the option and what it is.
    """
    kinds: dict[str, tuple[object, Any, str]] = {
        "optimizer_kwargs": (optimizer_kwargs, Mapping[str, Any] | None, "a dict of options"),
        "batch_dims": (batch_dims, Mapping[str, int | None] | None, "names with dimensions"),
        "seed": (seed, int | None, "a whole number, or None"),
    }
    for name, (value, kind, wanted) in kinds.items():
        try:
            check_types(value, kind)
        except TypeError:
            raise ConfigError(f"{name}={str(value)[:80]}: it is {wanted}") from None
