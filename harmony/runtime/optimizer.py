"""The parameter update, one pack at a time, by any `torch.optim` class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harmony.errors import ConfigError

OptimizerFactory = Callable[..., torch.optim.Optimizer]


def with_fused_default(factory: OptimizerFactory, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with ``fused=True`` where the class knows it and the user said nothing.

    The update runs on the CPU, where the fused kernels are several times as fast as the loops
    over operators. ``fused=False`` or ``foreach=...`` in the options is left alone.
    """
    chosen = dict(options)
    parameters = inspect.signature(factory).parameters
    if "fused" in parameters and "fused" not in chosen and chosen.get("foreach") is None:
        chosen["fused"] = True
    return chosen


class PackOptimizer:
    """One `torch.optim` optimizer whose step can be taken for some of its parameters at a time.

    Attributes:
        full: the optimizer over all parameters: what LR schedulers and checkpoints see.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        factory: OptimizerFactory,
        options: Mapping[str, Any],
    ) -> None:
        """Build ``factory(parameters, **options)``.

        Raises:
            ConfigError: if the optimizer cannot be built, or needs a closure.
        """
        if factory is torch.optim.LBFGS:
            raise ConfigError(
                "LBFGS calls the model several times in one step; Harmony runs it once. "
                "Use a first-order optimizer such as torch.optim.AdamW"
            )
        trainable = [p for p in params.values() if p.requires_grad]
        if not trainable:
            raise ConfigError("the model has no parameter with requires_grad=True to train")
        try:
            self.full = factory(trainable, **with_fused_default(factory, options))
        except (TypeError, ValueError, RuntimeError) as error:
            name = getattr(factory, "__name__", str(factory))
            given = dict(options)
            raise ConfigError(f"{name}(parameters, **{given!r}) failed: {error}") from error

    def describe(self) -> str:
        """Name of the optimizer and whether it is fused, for the report."""
        fused = any(group.get("fused") for group in self.full.param_groups)
        return type(self.full).__name__ + (" (fused)" if fused else "")

    def update(self, params: list[nn.Parameter]) -> None:
        """Take the optimizer's step for these parameters, whose gradients are complete."""
        chosen = {id(p) for p in params}
        part = object.__new__(type(self.full))
        part.__dict__.update(self.full.__dict__)  # the state is shared: it is kept per parameter
        part.param_groups = [
            {**group, "params": [p for p in group["params"] if id(p) in chosen]}
            for group in self.full.param_groups
        ]
        # An LR scheduler wraps `step` on the full optimizer; the part's is the class's own.
        type(self.full).step(part)
        self.full._opt_called = True  # type: ignore[attr-defined]  # what that wrapper would note
