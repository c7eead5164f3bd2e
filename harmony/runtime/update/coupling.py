"""Whether an optimizer's step for all parameters is its steps for some of them, one by one.

`torch.optim.AdamW` looks at one parameter after the other, so that each pack can be updated as
soon as its gradients are there. Others look at several: at a norm of all gradients, at a counter
that they keep on themselves or in a group. Nobody says which an optimizer is, so it is tried, on
small copies: what differs in a bit of a parameter, its state, a group or an attribute is coupled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harmony.capture.state.random_state import GeneratorStates
from harmony.runtime.update.native_step import own_step
from harmony.runtime.update.own_writes import ForeignWriteError, OwnWritesOnly
from harmony.runtime.update.part_step import step_part
from harmony.runtime.update.python_reach import PythonReach
from harmony.runtime.update.stand_ins import NoStandInError, StandIn, stand_in

SCALES = (1.0, 1e3, 1e-3, 1.0)
"""Sizes of the gradients of the steps that are tried: some couple only what is large or small."""

FAILS = "its step fails where it is tried"
WRITES = "its step changes what other steps see"

_SEED = 20221

_OF_TORCH = ("_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured")
"""What torch.optim's own classes note on themselves in a step, of no effect on the next."""


def why_coupled(optimizer: Any) -> str | None:
    """Return why the step has to be one of all parameters; None if packs can be updated alone."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return "it is no torch.optim.Optimizer"
    try:
        with _undisturbed(optimizer) as reach:
            return _found_by_trying(optimizer, reach)
    except NoStandInError as error:
        return f"it cannot be tried in small ({error})"


def closure_wanted(optimizer: Any) -> bool:
    """Whether the step cannot be called without a closure."""
    try:
        params = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return any(p.kind in kinds and p.default is inspect.Parameter.empty for p in params)


def _found_by_trying(optimizer: torch.optim.Optimizer, reach: PythonReach) -> str | None:
    whole = stand_in(optimizer)
    parts = [stand_in(optimizer) for _ in range(2)]
    cuts = [_one_by_one(whole.params), _halves(whole.params)]
    for number, scale in enumerate((*SCALES, float("nan"))):
        _give_gradients(whole, number, scale)
        try:
            own_step(whole.optimizer)
        except ForeignWriteError:
            return WRITES
        except Exception as error:
            if scale != scale:  # it may well refuse gradients that are no numbers
                return None
            return f"{FAILS} ({type(error).__name__}: {error})"
        if reach.changed():
            return WRITES
        expected = snapshot(whole)
        for part, packs in zip(parts, cuts, strict=True):
            try:
                for pack in packs:
                    # The gradients of others are not there yet, or those of the step before.
                    _give_gradients(part, number, scale, pack)
                    step_part(part.optimizer, [part.params[i] for i in pack])
            except ForeignWriteError:
                return WRITES
            except Exception as error:
                return f"its step for some of them fails ({type(error).__name__}: {error})"
            different = _first_difference(expected, snapshot(part))
            if different:
                return f"{different} depends on more than one parameter, or is of the whole step"
    return None


def _one_by_one(params: Sequence[nn.Parameter]) -> list[list[int]]:
    """Each parameter alone, the last one first, as a backward goes."""
    return [[index] for index in range(len(params))[::-1]]


def _halves(params: Sequence[nn.Parameter]) -> list[list[int]]:
    half = len(params) // 2
    halves = [list(range(half, len(params))), list(range(half))]
    return [part for part in halves if part]


def _give_gradients(
    made: StandIn, step: int, scale: float, chosen: Sequence[int] | None = None
) -> None:
    """The same ones for every copy; one that is no number, where the scale is none.

    Args:
        chosen: which of the parameters get theirs; by default all, and those in no group.
    """
    generator = torch.Generator().manual_seed(_SEED + step)
    for number, param in enumerate((*made.params, *made.others)):
        wide = torch.complex64 if param.is_complex() else torch.float32
        values = torch.randn(param.shape, generator=generator, dtype=wide)
        factor = scale
        if scale != scale:
            factor = scale if number == 0 else 1.0
        gets = param.requires_grad and (chosen is None or number in chosen)
        param.grad = (values * factor).to(param.dtype) if gets else None


@contextmanager
def _undisturbed(optimizer: torch.optim.Optimizer) -> Iterator[PythonReach]:
    """Give random generators, and plain values that the step's code reaches, back as they were.

    Tensors that it reaches are not written to.
    """
    before = GeneratorStates.now()
    reach = PythonReach(type(optimizer))
    try:
        torch.manual_seed(_SEED)
        with torch.enable_grad(), OwnWritesOnly():
            yield reach
    finally:
        reach.restore()
        before.restore()


# What a copy is: nested tuples, equal exactly where two copies are.


def snapshot(made: StandIn) -> dict[str, Any]:
    """All that a step can have changed, by what it is."""
    text = _Texts(made.names)
    own = {
        f"self.{name}": text.of(value)
        for name, value in made.optimizer.__dict__.items()
        if name not in ("state", "param_groups", *_OF_TORCH)
    }
    params = {f"parameter {made.names[id(p)]}": text.of(p.detach()) for p in made.params}
    state = {f"state {text.of(k)}": text.of(v) for k, v in made.optimizer.state.items() if v}
    groups = {
        f"param_groups[{number}][{key!r}]": text.of(value)
        for number, group in enumerate(made.optimizer.param_groups)
        for key, value in group.items()
    }
    return {**params, **state, **groups, **own}


def _first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    names = [*one, *(name for name in other if name not in one)]
    absent = object()
    return next((n for n in names if one.get(n, absent) != other.get(n, absent)), None)


class _Texts:
    """Turns values into what can be compared, whatever copy they are of."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names
        self._seen: set[int] = set()

    def of(self, value: Any) -> Any:
        """The value as nested tuples."""
        if id(value) in self._names:
            return ("parameter", self._names[id(value)])
        if isinstance(value, torch.Tensor):
            return _content(value)
        if isinstance(value, float):
            return ("nan",) if value != value else value
        if value is None or isinstance(value, (bool, int, complex, str, bytes)):
            return value
        if id(value) in self._seen:
            return ("again",)
        self._seen.add(id(value))
        try:
            return self._inside(value)
        finally:
            self._seen.discard(id(value))

    def _inside(self, value: Any) -> Any:
        kind = type(value).__qualname__
        if isinstance(value, dict):
            return (kind, [(self.of(k), self.of(v)) for k, v in value.items()])
        if isinstance(value, (list, tuple)):
            return (kind, [self.of(item) for item in value])
        if isinstance(value, (set, frozenset)):
            return (kind, sorted(repr(self.of(item)) for item in value))
        held = getattr(value, "__dict__", None)
        if held and not callable(value):
            return (kind, [(k, self.of(v)) for k, v in held.items()])
        return kind


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Form and bits of a tensor; one that is no number is like another."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return (str(tensor.dtype), tuple(tensor.shape))
    held = tensor.detach().cpu()
    if held.is_floating_point():
        held = torch.where(held.isnan(), torch.full_like(held, float("nan")), held)
    raw = held.contiguous().reshape(-1).view(torch.uint8)
    return (str(tensor.dtype), tuple(tensor.shape), bytes(raw.tolist()))
