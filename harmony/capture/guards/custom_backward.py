"""Backwards of custom functions that have to be called once, on real values.

Layers are run on made-up values to be measured and tried, their backwards with them. One that
writes to something outside would write then, too.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from harmony.capture.guards.observe import is_users
from harmony.capture.trace.refuse import DynamicOnlyError
from harmony.errors import ConfigError

_WRITES = frozenset({"append", "appendleft", "extend", "insert", "add", "update", "setdefault"})
_WRITES |= {"pop", "popleft", "popitem", "remove", "clear", "write", "writelines", "print"}
_WRITES |= {"debug", "info", "warning", "error", "log_metrics", "put", "put_nowait", "setattr"}
_WRITES |= {"add_scalar", "open", "save", "warn", "next", "exec", "eval", "delattr", "increment"}
_HARMLESS: tuple[type, ...] = (type, ModuleType, BuiltinFunctionType, int, float, complex)
_HARMLESS += (str, bytes, bool, tuple)
_HARMLESS += (torch.dtype, torch.device, torch.Size, type(None), frozenset)
_IN_PLACE = frozenset(
    name for name in dir(torch.Tensor) if name.endswith("_") and not name.startswith("_")
)
_MOST_CALLED = 100


def check_custom_backward(function: type[torch.autograd.Function]) -> None:
    """Let a module run as it is if a custom function's backward does more than compute.

    Only the program's own are looked at; what an installed library writes there is its own.

    Raises:
        DynamicOnlyError: naming the function and its place.
        ConfigError: if it changes a tensor in place that it was given.
    """
    for name in ("backward", "vjp"):
        held = _function(getattr(function, name, None))
        if held is None or not is_users(held.__code__):
            continue
        code = held.__code__
        given = _changed_in_place(code)
        if given is not None:
            raise ConfigError(
                f"the backward of {function.__name__} at {code.co_filename}:{code.co_firstlineno} "
                f"changes ctx.{given} in place: where it runs on a GPU, that is a copy of the "
                "tensor that it was given. Change it in a hook of the optimizer, or return it"
            )
        written = _written(held)
        if written is not None:
            raise DynamicOnlyError(
                f"the backward of {function.__name__} does more than compute a result ({written})",
                f"{code.co_filename}:{code.co_firstlineno}",
                eager=True,
            )


def _written(function: FunctionType) -> str | None:
    """What a function, or one of the program's that it calls, writes to."""
    pending, seen = [function], {function.__code__}
    while pending and len(seen) < _MOST_CALLED:
        called = pending.pop()
        for code in _nested(called.__code__):
            found = _by_code(code)
            if found is not None:
                return found
        cells = zip(called.__code__.co_freevars, called.__closure__ or (), strict=True)
        outside = [(n, called.__globals__.get(n)) for n in _names(called.__code__)]
        for name, held in (*outside, *((n, c.cell_contents) for n, c in cells)):
            inner = _function(held)
            if inner is None:
                if not isinstance(held, (*_HARMLESS, torch.Tensor)):
                    return name  # it may be a log, or an object that counts
            elif is_users(inner.__code__) and inner.__code__ not in seen:
                seen.add(inner.__code__)
                pending.append(inner)
    return None


def _changed_in_place(code: CodeType) -> str | None:
    """The attribute of the first argument that holds a tensor which is changed, if one is."""
    steps = list(dis.get_instructions(code))
    first = code.co_varnames[0] if code.co_varnames else None
    for context, attribute, method in zip(steps, steps[1:], steps[2:], strict=False):
        loads = context.opname.startswith("LOAD_FAST") and attribute.opname == "LOAD_ATTR"
        if loads and first in _locals(context) and str(method.argval) in _IN_PLACE:
            return str(attribute.argval)
    return None


def _by_code(code: CodeType) -> str | None:
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF"):
            if step.opname != "STORE_DEREF" or step.argval in code.co_freevars:
                return str(step.argval)
        elif step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            own = before is not None and before.opname.startswith("LOAD_FAST")
            first = code.co_varnames[0] if code.co_varnames else None
            if not (own and before is not None and first in _locals(before)):
                return str(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"):
            name = str(step.argval)
            if name in _WRITES or (name in _IN_PLACE and step.opname != "LOAD_GLOBAL"):
                return name
        elif step.opname == "STORE_SUBSCR":
            return "an item"
        before = step
    return None


def _locals(step: dis.Instruction) -> tuple[Any, ...]:
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _names(code: CodeType) -> Iterator[str]:
    for inner in _nested(code):
        for step in dis.get_instructions(inner):
            if step.opname == "LOAD_GLOBAL":
                yield str(step.argval)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _function(held: Any) -> FunctionType | None:
    held = getattr(held, "__func__", held)
    held = getattr(held, "__wrapped__", held)
    return held if isinstance(held, FunctionType) else None
