"""Notices who gets hold of a parameter's memory behind its version counter.

PyTorch counts the in-place operations on a tensor, but what is written through ``param.data``
counts for the tensor that ``.data`` made, not for the parameter. So while weights live elsewhere,
`torch.nn.Parameter` has a ``data`` property that does what PyTorch's does and takes a note. What
``param.detach()`` returns counts for the parameter, until it becomes an array: who cannot go by
that is told of ``detach()`` as well.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import nn

_PLAIN = torch.Tensor.data  # the descriptor that all tensors share
_lock = threading.Lock()  # of what Parameter has: it is there while anybody watches
_watches: weakref.WeakSet[Listener] = weakref.WeakSet()
_of_detached: weakref.WeakSet[Listener] = weakref.WeakSet()
_MANY = 64


class Listener(Protocol):
    """Hears of every parameter whose ``data`` somebody asks for, or is about to replace."""

    def _note(self, param: torch.Tensor, alias: torch.Tensor | None) -> None: ...


def listen(listener: Listener, *, detached: bool = False) -> None:
    """Let something hear for as long as it lives; of ``detach()`` as well, if wanted."""
    with _lock:
        _watches.add(listener)
        if "data" not in nn.Parameter.__dict__:
            nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]
        if detached:
            _of_detached.add(listener)
            if "detach" not in nn.Parameter.__dict__:
                nn.Parameter.detach = _detach  # type: ignore[assignment]


class DataWatch:
    """Some parameters whose ``data`` is watched, for as long as this object lives."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        # Parameters live as long as their model, which holds this; ids need no hash of a tensor.
        self._given: dict[int, list[weakref.ref[torch.Tensor]]] = {id(p): [] for p in params}
        self._touched: set[int] = set()
        if self._given:
            listen(self)

    def may_have_changed(self, param: torch.Tensor) -> bool:
        """Whether its ``data`` was asked for or set since the last time, or is still in use."""
        key = id(param)
        given = self._given.get(key)
        if given is None:
            return False
        _forget_dead(given)
        found = bool(given) or key in self._touched
        self._touched.discard(key)
        return found

    def _note(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        given = self._given.get(id(param))
        if given is not None:
            self._touched.add(id(param))
            if alias is not None:
                given.append(weakref.ref(alias))
            if len(given) > _MANY:
                _forget_dead(given)


def _forget_dead(aliases: list[weakref.ref[torch.Tensor]]) -> None:
    aliases[:] = [alias for alias in aliases if alias() is not None]


def _get(param: torch.Tensor) -> torch.Tensor:
    data: torch.Tensor = _PLAIN.__get__(param)  # type: ignore[attr-defined]
    _tell(param, data)
    return data


def _set(param: torch.Tensor, value: torch.Tensor) -> None:
    _tell(param, None)
    _PLAIN.__set__(param, value)  # type: ignore[attr-defined]


def _detach(param: torch.Tensor) -> torch.Tensor:
    for watch in list(_of_detached):
        watch._note(param, None)
    _leave_class()
    return torch.Tensor.detach(param)


def _tell(param: torch.Tensor, alias: torch.Tensor | None) -> None:
    for watch in list(_watches):
        watch._note(param, alias)
    _leave_class()


def _leave_class() -> None:
    """Let the class be as PyTorch made it where nobody watches any more."""
    with _lock:
        for name, watches in (("data", _watches), ("detach", _of_detached)):
            if not watches and name in nn.Parameter.__dict__:
                delattr(nn.Parameter, name)
