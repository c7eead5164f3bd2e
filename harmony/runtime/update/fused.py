"""Whether an optimizer's fused form computes here what its default form does.

Fused kernels update parameters on the CPU several times as fast as loops over operators. Not all
do the same: that of `torch.optim.SGD` in torch 2.13.0 leaves bf16 and fp16 parameters nearly as
they are (pytorch#191763). So it is tried, with the options and dtypes in use.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.runtime.update.part_step import own_step

Factory = Callable[..., torch.optim.Optimizer]
Groups = Sequence[Mapping[str, Any]]

SIZES = (1, 7, 67, 1000)
"""Elements of the parameters that are tried: less than a vector register, its multiples, rests."""

NUM_STEPS = 4

UNITS = 16
"""Units in the last place, of the parameter and of its state, that wide dtypes may differ by after
those steps: a fused kernel may order the same operations otherwise. Narrow ones: none, since
there each operation rounds away what a fused kernel keeps."""

_WIDE = (torch.float32, torch.float64)
_known: dict[tuple[Any, ...], bool] = {}


def with_fused_default(
    factory: Factory, options: Mapping[str, Any], given: Sequence[Any]
) -> dict[str, Any]:
    """Return the options, with ``fused=True`` where that computes the same.

    Args:
        given: the parameters, or groups of them, that the optimizer is to be made of.

    What the user has said of ``fused`` or ``foreach``, for all or in a group, stands.
    """
    chosen = dict(options)
    groups = [g for g in given if isinstance(g, Mapping)]
    said = [chosen, *groups]
    if any("fused" in g or g.get("foreach") is not None for g in said) or not _knows(factory):
        return chosen
    if fused_is_the_same(factory, options, _kinds(given, groups)):
        chosen["fused"] = True
    return chosen


def fused_is_the_same(
    factory: Factory, options: Mapping[str, Any], kinds: Sequence[tuple[str, Any, Any]]
) -> bool:
    """Whether both forms lead to the same parameters and state, tried once for each case.

    Args:
        kinds: text and value of the options of each group, and a dtype of its parameters.
    """
    key = (factory, repr(sorted(options.items())), tuple((t, d) for t, _, d in kinds))
    if key not in _known:
        try:
            default = _run(factory, options, kinds)
            _known[key] = _close(default, _run(factory, {**options, "fused": True}, kinds))
        except Exception:
            _known[key] = False  # whatever is wrong with it, the default shows it as well
    return _known[key]


def _knows(factory: Factory) -> bool:
    try:
        return "fused" in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def _kinds(given: Sequence[Any], groups: Groups) -> list[tuple[str, Any, Any]]:
    """Options of each group as text and as they are, with each dtype of its parameters."""
    found: dict[tuple[str, torch.dtype], Any] = {}
    for group in groups or [{"params": given}]:
        options = {key: value for key, value in group.items() if key != "params"}
        text = repr(sorted(options.items()))
        for param in group["params"]:
            tensor = param[1] if isinstance(param, tuple) else param
            found[text, tensor.dtype] = options
    return [(text, options, dtype) for (text, dtype), options in found.items()]


Result = list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]
"""Per parameter: what it was, what it is, and its state."""


def _run(
    factory: Factory, options: Mapping[str, Any], kinds: Sequence[tuple[str, Any, Any]]
) -> Result:
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    groups = [
        {**copy.deepcopy(own), "params": [nn.Parameter(draw(size, dtype)) for size in SIZES]}
        for _, own, dtype in kinds
    ]
    params = [param for group in groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    optimizer = factory(groups, **copy.deepcopy(dict(options)))
    if [id(p) for g in optimizer.param_groups for p in g["params"]] != [id(p) for p in params]:
        raise ValueError("the factory makes its optimizer of other parameters")
    for _ in range(NUM_STEPS):
        for param in params:
            param.grad = draw(param.numel(), param.dtype)
        own_step(optimizer)
    states = [dict(optimizer.state.get(param, {})) for param in params]
    return list(zip(before, (param.detach() for param in params), states, strict=True))


def _close(one: Result, other: Result) -> bool:
    for (before, a, state), (_, b, other_state) in zip(one, other, strict=True):
        if not _same(a, b, before) or state.keys() != other_state.keys():
            return False
        for key, held in state.items():
            found = other_state[key]
            if isinstance(held, torch.Tensor):
                if not _same(held, torch.as_tensor(found).to(held), held.abs().amax()):
                    return False
            elif held != found:
                return False
    return True


def _same(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two results are equal in all bits, or nearly, element by element."""
    equal = (a == b) | (a.isnan() & b.isnan())
    if bool(equal.all()):
        return True
    if a.dtype not in _WIDE:
        return False
    allowed = UNITS * torch.finfo(a.dtype).eps * (a.abs() + scale.abs())
    return bool((equal | ((a - b).abs() <= allowed)).all())
