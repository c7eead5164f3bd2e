"""Hooks that have to be called once, on real values: those that do more than compute.

A recorded layer runs again for its recompute, and is run on made-up values to be measured; its
hooks with it. Of a hook that computes a result from its arguments nobody can tell. One that
keeps, counts or shows something has to be called as often as in plain PyTorch.
"""

from __future__ import annotations

import builtins
import dis
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

from harmony.capture.guards.observe import is_machinery, is_users
from harmony.capture.trace.isolation import user_frame
from harmony.capture.trace.refuse import DynamicOnlyError

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ACTING = frozenset({"print", "open", "setattr", "delattr", "next", "exec", "eval", "input"})
_ACTING |= {"__import__", "globals", "locals", "vars", "breakpoint", "getattr", "super", "map"}
_ACTING |= {"__setitem__", "__delitem__", "__setattr__", "__delattr__", "__iadd__", "__setstate__"}
_ACTING |= {"set_", "save", "numpy", "register_hook", "backward", "share_memory_", "retain_grad"}
_COMPUTING = frozenset(dir(torch)) | frozenset(dir(torch.Tensor)) | frozenset(dir(F))
_COMPUTING |= frozenset(dir(math)) | frozenset(dir(builtins)) | frozenset(dir(tuple))
_COMPUTING |= {"torch", "nn", "F", "math", "functional"}
_STORES = frozenset({"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE_ATTR", "STORE_DEREF"})
_STORES |= {"DELETE_SUBSCR", "DELETE_GLOBAL", "STORE_NAME", "IMPORT_NAME"}


def check_hooks(net: nn.Module) -> None:
    """Let a module run as it is if it has a hook that does more than compute.

    Raises:
        DynamicOnlyError: naming the module and the hook's place.
    """
    for name, module in net.named_modules():
        for kind in _KINDS:
            for hook in module.__dict__[kind].values():
                if not _only_computes(hook):
                    where, label = _place(hook), name or type(net).__name__
                    raise DynamicOnlyError(
                        f"a hook of {label} does more than compute a result", where, eager=True
                    )
    everywhere = (getattr(torch_module, f"_global{kind}", None) or {} for kind in _KINDS)
    for hook in (hook for hooks in everywhere for hook in hooks.values()):
        if not _only_computes(hook):
            raise DynamicOnlyError(
                "a hook of all modules does more than compute a result", _place(hook), eager=True
            )


def hooks_of(modules: Iterable[nn.Module]) -> list[list[int]]:
    """Number the hooks that modules have, for each kind; those of installed libraries left out.

    What a library gives a module in its first forward, it gives it anew where that is missing
    (transformers does, for the outputs that it collects).
    """
    held = (module.__dict__[kind] for module in modules for kind in _KINDS)
    return [[n for n, hook in hooks.items() if not _is_librarys(hook)] for hooks in held]


def _is_librarys(hook: Any) -> bool:
    function = _function(hook)
    return function is not None and not (
        is_users(function.__code__) or is_machinery(function.__code__)
    )


def check_tensor_hook(name: str, args: Sequence[Any]) -> None:
    """Let a module run as it is if its forward keeps gradients of its tensors, or shows them.

    Args:
        name: what the forward calls: ``register_hook``, ``retain_grad`` or another function.
        args: its arguments, the tensor first.

    Raises:
        DynamicOnlyError: naming the place.
    """
    if name == "retain_grad":
        raise DynamicOnlyError(
            "the forward keeps the gradient of a tensor (retain_grad)", user_frame(), eager=True
        )
    if name == "register_hook" and not all(map(_only_computes, args[1:2])):
        raise DynamicOnlyError(
            "a hook of a tensor does more than compute a result", _place(args[1]), eager=True
        )


def _only_computes(hook: Any) -> bool:
    """Whether a hook's code shows that it has no effect beside what it returns."""
    function = _function(hook)
    if type(hook).__module__.startswith("torch."):  # of weight_norm, for instance
        return True
    if function is None:
        return False
    if _is_known(function):
        return True
    computing = all(map(_is_computing, _nested(function.__code__)))
    return computing and all(_is_known(held) for held in _brought(hook) if callable(held))


def _is_known(held: Any) -> bool:
    """Whether it is PyTorch's, or of `harmony.keep_fp32`."""
    return (getattr(held, "__module__", None) or "").split(".")[0] in ("torch", "harmony")


def _brought(hook: Any) -> Iterator[Any]:
    """What a hook has with it beside what it is called with: it may call that."""
    while isinstance(hook, functools.partial):
        yield from (*hook.args, *hook.keywords.values())
        hook = hook.func
    function = _function(hook)
    assert function is not None
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing is in it yet
            yield cell.cell_contents
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())


def _is_computing(code: CodeType) -> bool:
    names = code.co_names
    if not _COMPUTING.issuperset(names) or not _ACTING.isdisjoint(names):
        return False
    # What comes from around the hook may be a set to add to, or a tensor to change in place.
    changing = any(name == "add" or (name[-1] == "_" and name[:2] != "__") for name in names)
    if code.co_freevars and changing:
        return False
    return all(i.opname not in _STORES for i in dis.get_instructions(code))


def _function(hook: Any) -> FunctionType | None:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, MethodType):
        hook = hook.__func__
    if not isinstance(hook, FunctionType):
        hook = getattr(type(hook), "__call__", None)  # noqa: B004
    return hook if isinstance(hook, FunctionType) else None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _place(hook: Any) -> str:
    function = _function(hook)
    code = None if function is None else function.__code__
    return "?" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
