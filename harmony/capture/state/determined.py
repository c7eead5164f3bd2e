"""Runs layers as if nothing was random: dropout keeps everything, noise is its mean.

Samples together draw other numbers than samples apart, so what they compute can be compared only
where none are drawn. A random order (``randperm``) stays: it is of all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LIKELY: dict[str, Callable[..., torch.Tensor]] = {
    "normal": lambda mean, *_: mean,
    "poisson": lambda rate, *_: rate.round(),
    "binomial": lambda count, odds: (count * odds).round(),
    "multinomial": lambda odds, *_: odds.argmax(-1, keepdim=True),
    "_standard_gamma": lambda shape, *_: shape,
    "_sample_dirichlet": lambda shape, *_: shape / shape.sum(-1, keepdim=True),
}
"""What is drawn by tensors, and what is likely by them."""

_RATES = ("dropout", "dropout_p")


class Determined(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every kernel that draws random numbers gives the same for each entry."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name in _LIKELY and isinstance(args[0], torch.Tensor):
            drawn = func(*args, **kwargs)
            return drawn.copy_(_LIKELY[name](*args[:2]))
        drawn = _drawn(func, args, kwargs)
        if drawn is not None:
            return func(*args, **kwargs).fill_(drawn)
        args = list(args)
        for index, argument in enumerate(func._schema.arguments):
            if argument.name not in _RATES:
                continue
            if index < len(args):
                args[index] = 0.0
            elif argument.name in kwargs:
                kwargs[argument.name] = 0.0
        return func(*args, **kwargs)


def _drawn(func: Any, args: Any, kwargs: Any) -> float | None:
    """What a kernel that fills a tensor with random numbers fills it with here."""
    name = func.overloadpacket.__name__.removesuffix("_like").rstrip("_")

    def given(argument: str, otherwise: float) -> float:
        names = [known.name for known in func._schema.arguments]
        place = names.index(argument) if argument in names else len(args)
        found = args[place] if place < len(args) else kwargs.get(argument)
        return otherwise if found is None else float(found)

    match name:
        case "rand" | "uniform":
            return (given("from", 0.0) + given("to", 1.0)) / 2
        case "randn":
            return 0.0
        case "normal":
            return given("mean", 0.0)
        case "randint" | "random":
            low = given("low", given("from", 0.0))
            return float((low + given("high", given("to", low + 2.0))) // 2)
        case "exponential":
            return 1 / given("lambd", 1.0)
        case "bernoulli" | "geometric" | "log_normal" | "cauchy":
            return 1.0
    return None
