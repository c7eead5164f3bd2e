"""Puts a module, and what hangs on it, back to how it was: values, gradients, attributes."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from harmony.capture.guards.observe import is_users

_UNTOUCHED = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Size,
)
_DEPTH = 8


class Snapshot:
    """Everything that can be reached from some objects, as it is now.

    Tensors, containers and attributes are put back in place, so whoever holds one of these
    objects sees what it held. Of functions, and of the methods of the program's own classes,
    these are their closures, defaults, and the globals that their code names, so also what other
    functions of the program reach that they call.
    """

    def __init__(self, *roots: Any) -> None:
        """Keep a copy of every value; tensors are copied to the host."""
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        self._classes: set[type] = set()
        for root in roots:
            self._keep(root, _DEPTH)

    def restore(self) -> None:
        """Go back; possible more than once."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _keep(self, held: Any, depth: int) -> None:
        if id(held) in self._seen or depth < 0 or isinstance(held, _UNTOUCHED):
            return
        if isinstance(held, torch.Tensor):
            self._seen[id(held)] = held
            self._undo.append(_tensor(held))
            return
        if isinstance(held, torch.Generator):
            self._seen[id(held)] = held
            state = held.get_state()
            self._undo.append(lambda: _quietly(lambda: held.set_state(state)))
            return
        if isinstance(held, types.FunctionType):
            self._keep_function(held, depth)
            return
        inside = self._contents(held)
        if inside is None:
            return
        deeper = _DEPTH if isinstance(held, nn.Module) else depth - 1
        for one in inside:
            self._keep(one, deeper)

    def _keep_function(self, function: types.FunctionType, depth: int) -> None:
        self._seen[id(function)] = function
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # still empty
                self._undo.append(partial(setattr, cell, "cell_contents", cell.cell_contents))
                self._keep(cell.cell_contents, depth - 1)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._keep(default, depth - 1)
        named = function.__globals__
        for name in function.__code__.co_names:
            held = named.get(name, _UNTOUCHED)
            if isinstance(held, types.FunctionType):
                if is_users(held.__code__):
                    self._keep(held, depth - 1)
            elif name in named and not isinstance(held, _UNTOUCHED):
                self._undo.append(partial(named.__setitem__, name, held))
                self._keep(held, depth - 1)
            elif isinstance(held, type):
                self._keep_class(held, depth - 1)

    def _keep_class(self, kind: type, depth: int) -> None:
        """Note what a class of the program holds itself, and what its methods reach."""
        if kind in self._classes:
            return
        self._classes.add(kind)
        for owner in kind.__mro__:
            functions = {n: f for n, held in vars(owner).items() if (f := _function(held))}
            if not any(is_users(f.__code__) for f in functions.values()):
                continue
            for name, held in list(vars(owner).items()):
                if name in functions:
                    self._keep(functions[name], depth)
                elif not name.startswith("__") and not hasattr(held, "__get__"):
                    self._undo.append(_class_attribute(owner, name, held))
                    self._keep(held, depth - 1)

    def _contents(self, held: Any) -> Iterable[Any] | None:
        """What an object holds, after its present contents were noted; None for a plain value."""
        if isinstance(held, (tuple, frozenset)):
            return held
        if isinstance(held, dict):
            self._note(held, _dictionary(held))
            return list(held.values())
        if isinstance(held, (list, deque)):
            self._note(held, _sequence(held))
            return list(held)
        if isinstance(held, set):
            self._note(held, _set(held))
            return list(held)
        if isinstance(held, types.MethodType):
            return held.__func__, held.__self__
        if isinstance(held, partial):
            return held.func, held.args, held.keywords
        if type(held).__module__ == "numpy" and hasattr(held, "tobytes") and held.shape:
            self._note(held, partial(held.__setitem__, ..., held.copy()))
            return ()
        attributes = getattr(held, "__dict__", None)
        if not isinstance(attributes, dict) or type(held).__module__.startswith("harmony"):
            return None
        self._keep_class(type(held), _DEPTH if isinstance(held, nn.Module) else _DEPTH // 2)
        self._note(held, lambda: None)
        self._note(attributes, _dictionary(attributes))
        return list(attributes.values())

    def _note(self, held: Any, undo: Callable[[], None]) -> None:
        self._seen[id(held)] = held  # as long as it lives, nothing else has its id
        self._undo.append(undo)


def _function(held: Any) -> types.FunctionType | None:
    """The function behind a method, a property and decorators."""
    held = getattr(held, "__func__", None) or getattr(held, "fget", None) or held
    while hasattr(held, "__wrapped__"):
        held = held.__wrapped__
    return held if isinstance(held, types.FunctionType) else None


def _class_attribute(owner: type, name: str, held: Any) -> Callable[[], None]:
    def undo() -> None:
        if vars(owner).get(name) is not held:
            setattr(owner, name, held)

    return undo


def _dictionary(held: dict[Any, Any]) -> Callable[[], None]:
    before = dict(held)

    def undo() -> None:
        if len(held) != len(before) or any(held.get(k, held) is not v for k, v in before.items()):
            held.clear()
            held.update(before)

    return undo


def _sequence(held: Any) -> Callable[[], None]:
    before = list(held)

    def undo() -> None:
        if len(held) != len(before) or any(a is not b for a, b in zip(held, before, strict=True)):
            held.clear()
            held.extend(before)

    return undo


def _set(held: set[Any]) -> Callable[[], None]:
    before = set(held)

    def undo() -> None:
        held.clear()
        held.update(before)

    return undo


def _tensor(tensor: torch.Tensor) -> Callable[[], None]:
    """Undo what happens to a tensor's values, and to its ``grad``."""
    grad = tensor.grad if tensor.is_leaf else None
    back = None if grad is None else _values(grad)
    values = _values(tensor)

    def undo() -> None:
        values()
        if tensor.is_leaf and not tensor.is_inference():
            tensor.grad = grad
        if back is not None:
            back()

    return undo


def _values(tensor: torch.Tensor) -> Callable[[], None]:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return lambda: None
    before = tensor.detach().to("cpu", copy=True)

    def undo() -> None:
        now = tensor.detach()
        # Only what has changed is written: a write tells others that there are new values.
        if now.shape == before.shape and not same_bits(now.cpu(), before):
            now.copy_(before)

    return undo


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors hold the same values; NaN is the same as NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if torch.equal(one, two):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except RuntimeError:  # a generator of a device that is no more
        return
