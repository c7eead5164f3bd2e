"""Small copies of an optimizer, to try its step on without the user's objects seeing it.

A copy has parameters of its own, of the same kinds (group, dtype, number of dimensions), and
whatever else the optimizer holds: options, state, attributes, optimizers that it wraps.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]

TAIL = 67
"""Elements of a stand-in with one dimension: more than a vector register holds, and a rest."""

_SIDES = {0: (), 1: (TAIL,), 2: (13, 7), 3: (5, 4, 3)}
_LARGEST_COPY = 1 << 16
"""Elements of the largest tensor that is copied; an optimizer that holds more is not tried."""

_HARMLESS_LR = 0.01


class NoStandInError(Exception):
    """An optimizer cannot be copied in small."""


@dataclass(frozen=True)
class StandIn:
    """A small copy of an optimizer.

    Attributes:
        optimizer: the copy.
        params: its parameters, in the order of its groups.
        names: a name of each parameter that the copy may refer to, by identity: equal in all
            copies of the same optimizer.
        others: stand-ins that are in no group; a name is theirs only while they live.
    """

    optimizer: torch.optim.Optimizer
    params: list[nn.Parameter]
    names: dict[int, str]
    others: list[nn.Parameter]


def small_shape(shape: Shape) -> Shape:
    """A shape of as many dimensions, equal for equal shapes, with few elements."""
    sides = _SIDES.get(len(shape), (4, 3, *([2] * (len(shape) - 2))))
    return tuple(min(side, most) for side, most in zip(shape, sides, strict=True))


def usual_choice(full: torch.optim.Optimizer, per_kind: int = 2) -> dict[int, Shape]:
    """Parameters that stand for all, by identity: a few of each kind in each group, small."""
    chosen: dict[int, Shape] = {}
    for group in full.param_groups:
        counts: dict[tuple[Any, ...], int] = {}
        for param in group["params"]:
            shape = small_shape(tuple(param.shape))
            kind = (param.dtype, shape)
            counts[kind] = counts.get(kind, 0) + 1
            if counts[kind] <= per_kind:
                chosen[id(param)] = shape
    return chosen


def stand_in(
    full: torch.optim.Optimizer,
    chosen: Mapping[int, Shape] | None = None,
    *,
    with_state: bool = True,
) -> StandIn:
    """Copy an optimizer with other parameters.

    The values of the parameters are drawn from a generator of their own; a learning rate of 0
    becomes another, since nothing shows of a step without one.

    Args:
        chosen: the parameters that the copy has one for, by identity, with its shape.
        with_state: whether the copy has the state of its parameters; it is as new if not.

    Raises:
        NoStandInError: if it holds what cannot be copied, or is too large to be.
    """
    chosen = usual_choice(full) if chosen is None else chosen
    optimizers = _optimizers_in(full)
    memo: dict[int, Any] = {}
    names: dict[int, str] = {}
    kept: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    generator = torch.Generator().manual_seed(0)
    for group_number, group in enumerate(full.param_groups):
        for number, param in enumerate(group["params"]):
            shape = chosen.get(id(param), small_shape(tuple(param.shape)))
            made = _param_like(param, shape, generator)
            memo[id(param)] = made
            names[id(made)] = f"{group_number}.{number}"
            (kept if id(param) in chosen else others).append(made)
    copies = [object.__new__(type(optimizer)) for optimizer in optimizers]
    memo.update((id(held), new) for held, new in zip(optimizers, copies, strict=True))
    try:
        with _SmallCopies():
            for optimizer, new in zip(optimizers, copies, strict=True):
                _prepare(optimizer, chosen, memo, with_state)
                held = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
                new.__dict__.update(copy.deepcopy(held, memo))
    except Exception as error:
        raise NoStandInError(f"{type(error).__name__}: {error}") from error
    _let_move(copies)
    return StandIn(copies[0], kept, names, others)


def _optimizers_in(full: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer and those that it holds."""
    found = [full]
    for optimizer in found:
        for held in optimizer.__dict__.values():
            for item in _items(held):
                if isinstance(item, torch.optim.Optimizer) and all(item is not f for f in found):
                    found.append(item)
    return found


def _items(held: object) -> Iterator[object]:
    if isinstance(held, (list, tuple)):
        yield from held
    elif isinstance(held, dict):
        yield from held.values()
    else:
        yield held


def _param_like(param: nn.Parameter, shape: Shape, generator: torch.Generator) -> nn.Parameter:
    dtype = param.dtype
    wide = torch.complex64 if dtype.is_complex else torch.float32
    values = torch.randn(shape, generator=generator, dtype=wide)
    made = nn.Parameter(values.to(dtype), requires_grad=param.requires_grad)
    made.__dict__.update(param.__dict__)  # marks that an optimizer may go by
    return made


def _prepare(
    optimizer: torch.optim.Optimizer,
    wanted: Mapping[int, Shape],
    memo: dict[int, Any],
    with_state: bool,
) -> None:
    """Let the copy's groups hold the chosen parameters only, and their state fit them."""
    for group in optimizer.param_groups:
        params = group["params"]
        memo[id(params)] = [memo[id(p)] for p in params if id(p) in wanted]
    state: defaultdict[Any, Any] = defaultdict(dict)
    memo[id(optimizer.state)] = state
    for key, held in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            state[key] = copy.deepcopy(held, memo)
        elif with_state and id(key) in wanted:
            made = memo[id(key)]
            for part in held.values() if isinstance(held, dict) else ():
                if isinstance(part, torch.Tensor) and part.shape == key.shape:
                    memo[id(part)] = _resized(part, made)
            state[made] = copy.deepcopy(held, memo)


def _resized(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Its first values in another shape, again and again; zeros where it has none."""
    if tensor.is_meta or not tensor.numel():
        return torch.zeros(like.shape, dtype=tensor.dtype, device=like.device)
    places = torch.arange(like.numel()) % tensor.numel()
    return tensor.detach().reshape(-1)[places.to(tensor.device)].cpu().view(like.shape)


def _let_move(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, (float, int)) and rate == 0:
                group["lr"] = _HARMLESS_LR


class _SmallCopies(TorchFunctionMode):
    """Refuses to copy large tensors, while it is active."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func in (torch.Tensor.__deepcopy__, torch.Tensor.clone)
        if copies and args[0].numel() > _LARGEST_COPY:
            raise NoStandInError(f"it holds a tensor of {args[0].numel()} elements")
        return func(*args, **(kwargs or {}))
