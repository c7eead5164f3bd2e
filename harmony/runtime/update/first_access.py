"""Notices the first access to parameters, or to their optimizer, before it happens.

A plain attribute access cannot be made to wait. But an object's class can be another for a while:
PyTorch hands every function and method that reads or writes a tensor of a subclass to the class
first (``__torch_function__``), and an optimizer's attributes go through its class anyway.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from harmony.runtime.host.memory_holders import shares_memory

Call = Callable[[], object]

_FORMS = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf")
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_HARMLESS = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in (*_FORMS, *_HOOKS)]
    + [torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement]
)
"""What asks for no value of a parameter, and for no memory."""

_MAKES_PARAMETER = nn.Parameter.__new__.__code__
"""It asks for the class before it detaches, and wants the same one back."""

_LEFT_ALONE = frozenset({"param_groups", "defaults", "step", "_opt_called", "__class__"})
"""Attributes of an optimizer that LR schedulers use; `step` itself goes on to others."""


class FirstAccess:
    """Calls a function before anybody reads or writes what is watched."""

    def __init__(self, call: Call) -> None:
        """Call the method ``call``, which has to end the watch, before an access goes on."""
        method = weakref.WeakMethod(call)

        def called() -> None:
            known = method()
            assert known is not None, "it is called before it goes"
            known()

        self._call = called
        self._class = _parameter_class(self._call)
        self._params: list[nn.Parameter] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._kind: type = object

    def watch(self, params: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Watch these parameters and their optimizer until `end`."""
        for param in params:
            self._params.append(param)
            param.__class__ = self._class
        self._kind, watched = type(optimizer), _optimizer_class(type(optimizer), self._call)
        self._optimizer = optimizer
        optimizer.__class__ = watched

    def end_for_optimizer(self) -> None:
        """Watch the parameters only, from now on."""
        if self._optimizer is not None:
            object.__setattr__(self._optimizer, "__class__", self._kind)
            self._optimizer = None

    def end(self) -> None:
        """Let everything be as it was."""
        self.end_for_optimizer()
        while self._params:
            self._params.pop().__class__ = nn.Parameter


def why_unwatched(params: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> str | None:
    """Why an access to these could go unnoticed; None if none can.

    Memory that somebody has is read past the parameter, so nobody but them may have it.
    """
    if sys.getrefcount(optimizer.__dict__["state"]) > _HELD_ONCE:
        return "somebody holds the optimizer's state"
    if "__slots__" in vars(type(optimizer)):
        return f"{type(optimizer).__name__} has slots"
    for param in params:
        if type(param) is not nn.Parameter:
            return f"a parameter is a {type(param).__name__}"
        if shares_memory(param):
            return "somebody holds memory of a parameter: .data, .detach(), an array, a state_dict"
        state = optimizer.state.get(param)
        if state is not None and _is_held(state):
            return "somebody holds a tensor of the optimizer's state"
    return None


def _is_held(state: dict[str, Any]) -> bool:
    tensors = [name for name, held in state.items() if isinstance(held, torch.Tensor)]
    return any(
        sys.getrefcount(state[name]) > _HELD_ONCE or shares_memory(state[name]) for name in tensors
    )


_once = {0: torch.zeros(1)}
_HELD_ONCE = sys.getrefcount(_once[0])
"""References to an object that only a dictionary has."""


def _parameter_class(call: Call) -> Any:
    """A class like `nn.Parameter`, whose instances call ``call`` first."""

    def at_function(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        call()
        if func is torch.Tensor.detach and sys._getframe(1).f_code is _MAKES_PARAMETER:
            return torch.Tensor._make_subclass(nn.Parameter, *args)
        return func(*args, **(kwargs or {}))

    def at_copy(self: Any, memo: Any) -> Any:
        call()
        return self.__deepcopy__(memo)

    def at_pickle(self: Any, protocol: Any) -> Any:
        call()
        return self.__reduce_ex__(protocol)

    def at_swap(self: Any) -> int:  # torch.utils.swap_tensors asks for it before it swaps classes
        call()
        return int(self._use_count())

    members = {"__deepcopy__": at_copy, "__reduce_ex__": at_pickle, "_use_count": at_swap}
    return _like(nn.Parameter, __torch_function__=classmethod(at_function), **members)


def _optimizer_class(kind: Any, call: Call) -> Any:
    """A class like an optimizer's, whose instance calls ``call`` first."""

    def at_get(self: Any, name: str) -> Any:
        if name in _LEFT_ALONE:
            return kind.__getattribute__(self, name)
        call()
        return getattr(self, name)

    def at_set(self: Any, name: str, value: Any) -> None:
        if name not in _LEFT_ALONE:
            call()
        kind.__setattr__(self, name, value)

    return _like(kind, __getattribute__=at_get, __setattr__=at_set)


def _like(kind: Any, **members: Any) -> Any:
    """Return a subclass that shows itself as the class itself."""
    shown = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**shown, **members})
