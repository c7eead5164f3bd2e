"""Calls of ``torch.vmap`` as one step: what the mapped function closes over becomes arguments.

Attention masks, for one, are made so: of functions of indices that close over the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harmony.capture.trace.isolation import user_frame
from harmony.capture.trace.refuse import UnrecordableError, hides_tensors

_DEEPEST = 50


class MappedCall:
    """A call of ``vmap`` that takes the tensors which the mapped function closes over.

    Attributes:
        captured: those tensors, as they were at the call.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        function: Callable[..., Any],
        modes: Sequence[TorchFunctionMode],
    ) -> None:
        """Look into a function.

        Args:
            call: takes the function, and what the call gives it.
            modes: that are on around the call.

        Raises:
            UnrecordableError: if the function reaches tensors in another way.
        """
        self.captured: list[torch.Tensor] = []
        self._call = call
        self._function = function
        self._modes = tuple(modes)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            self.captured.append(tensor)
            return tensor

        _mapped(function, note)

    def __call__(self, captured: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call it with other tensors in the place of ``captured``."""
        tensors = iter(captured)
        function = _mapped(self._function, lambda _: next(tensors))
        with ExitStack() as stack:
            for mode in self._modes:
                stack.enter_context(mode)
            return self._call(function, *args, **kwargs)


def _mapped(held: Any, put: Callable[[torch.Tensor], torch.Tensor], depth: int = 0) -> Any:
    """Return a function, or what one closes over, with other tensors in it; itself if it has none.

    Raises:
        UnrecordableError: if it holds tensors where they cannot be replaced.
    """
    if isinstance(held, torch.Tensor):
        return put(held)
    inner = functools.partial(_mapped, put=put, depth=depth + 1)
    if depth > _DEEPEST or isinstance(held, nn.Module) or hides_tensors(held):
        raise UnrecordableError(
            f"torch.vmap at {user_frame()} maps a function that reaches tensors through "
            f"{type(held).__name__}: call it inside a module that is recorded as a layer"
        )
    if isinstance(held, FunctionType):
        return _with_cells(held, inner)
    if isinstance(held, functools.partial):
        given = {name: inner(value) for name, value in held.keywords.items()}
        return functools.partial(inner(held.func), *map(inner, held.args), **given)
    if type(held) in (tuple, list):
        return type(held)(map(inner, held))
    if type(held) is dict:
        return {key: inner(value) for key, value in held.items()}
    owner = getattr(held, "__self__", None)  # of a method
    if isinstance(owner, (nn.Module, torch.Tensor)):
        inner(nn.Identity())  # refused
    return held


def _with_cells(function: FunctionType, inner: Callable[[Any], Any]) -> FunctionType:
    held = [_contents(cell) for cell in function.__closure__ or ()]
    cells = [None if one is _EMPTY else inner(one) for one in held]
    defaults = function.__defaults__ and tuple(map(inner, function.__defaults__))
    same = all(one is other for one, other in zip(held, cells, strict=True) if one is not _EMPTY)
    if same and all(map(_is, defaults or (), function.__defaults__ or ())):
        return function
    made = tuple(
        CellType() if one is _EMPTY else CellType(other)
        for one, other in zip(held, cells, strict=True)
    )
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, made)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_EMPTY = object()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is(one: Any, other: Any) -> bool:
    return one is other
