"""In which type a model computes, whatever its own parameters are.

The semantics of ``"bf16"`` are those of PyTorch's FSDP2 with ``MixedPrecisionPolicy(
param_dtype=torch.bfloat16, reduce_dtype=torch.float32)`` around the whole model: parameters and
inputs of floating point are cast, buffers keep their type, the gradients of a microbatch come out
in bf16 and add up in fp32, and the optimizer steps on fp32 gradients and parameters. ``"fp16"`` is
the same with ``torch.float16``; `train_step` scales the loss as a loop with a
`torch.amp.GradScaler` does: ``scaler.scale(loss).backward()``, ``scaler.unscale_(optimizer)``,
clipping, ``scaler.step(optimizer)``, ``scaler.update()``. In a loop of one's own that is the
loop's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.structure import flatten
from harmony.core.options import PRECISIONS
from harmony.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """One way to compute.

    Attributes:
        name: as the user says it.
        dtype: of parameters and inputs of floating point on the GPUs; None: as they are.
    """

    name: str
    dtype: torch.dtype | None

    def cast(self, call: Any) -> Any:
        """Return the arguments of the model as it computes with them."""
        if self.dtype is None:
            return call
        leaves, structure = flatten(call)
        cast = [self._cast(leaf) for leaf in leaves]
        if all(one is two for one, two in zip(leaves, cast, strict=True)):
            return call
        return structure.unflatten(cast)

    def _cast(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.to(self.dtype)

    def check(self, net: nn.Module) -> None:
        """Refuse parameters that are trained and no fp32 masters.

        Raises:
            ConfigError: naming one.
        """
        if self.dtype is None:
            return
        for name, param in net.named_parameters():
            if param.requires_grad and param.dtype not in (torch.float32, torch.complex64):
                raise ConfigError(
                    f"precision={self.name!r} trains masters in fp32, and {name} is {param.dtype}."
                    " Give the model fp32 parameters (module.float()), freeze this one, or leave "
                    "precision= out to train the parameters in the types that they have"
                )

    def refuse(self, what: str) -> None:
        """Refuse forwards that run as they are, with the module's own parameters.

        Raises:
            ConfigError: if that would be another precision than the one that was asked for.
        """
        if self.dtype is not None:
            raise ConfigError(
                f"precision={self.name!r}: {what}, so no recorded forward stands for the next, "
                "and the module would run as it is, with its fp32 parameters. Let the forward "
                "return what it leaves, and take what changes as an input; or leave precision= "
                "out, and cast by torch.autocast"
            )


FP32 = Precision("fp32", None)
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(name: object) -> Precision:
    """Return the precision of a name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in PRECISIONS or not isinstance(name, str):
        raise ConfigError(f"precision={name!r}: choose one of {', '.join(PRECISIONS)}")
    return Precision(name, _DTYPES[name])
