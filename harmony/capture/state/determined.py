"""Runs layers as if nothing was random: dropout keeps everything, noise is its mean.

Samples together draw other numbers than samples apart, so what they compute can be compared only
where none are drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MEANS = {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}
_FILLED = frozenset({"geometric_", "log_normal_", "cauchy_"})
_RATES = ("dropout", "dropout_p")


class Determined(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every kernel that draws random numbers gives the same for each entry."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "bernoulli":
            return torch.ones_like(args[0])
        drawn = _drawn(name, args, kwargs)
        if drawn is not None:
            return args[0].fill_(drawn)
        if name in _MEANS:
            return func(*args, **kwargs).fill_(_MEANS[name])
        args = list(args)
        for index, argument in enumerate(func._schema.arguments):
            if argument.name not in _RATES:
                continue
            if index < len(args):
                args[index] = 0.0
            elif argument.name in kwargs:
                kwargs[argument.name] = 0.0
        return func(*args, **kwargs)


def _drawn(name: str, args: Any, kwargs: Any) -> float | None:
    """What a kernel that fills its first argument with random numbers fills it with here."""
    if name == "bernoulli_":
        return 1.0
    if name == "normal_":
        return float(kwargs.get("mean", args[1] if len(args) > 1 else 0.0))
    if name == "uniform_":
        low = kwargs.get("from", args[1] if len(args) > 1 else 0.0)
        high = kwargs.get("to", args[2] if len(args) > 2 else 1.0)
        return float(low + high) / 2
    if name == "exponential_":
        return 1 / float(kwargs.get("lambd", args[1] if len(args) > 1 else 1.0))
    if name in _FILLED:
        return 1.0
    return None
