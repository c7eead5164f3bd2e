"""Notices who gets hold of a parameter's memory behind its version counter.

PyTorch counts the in-place operations on a tensor, but what is written through ``param.data``
counts for the tensor that ``.data`` made, not for the parameter. So while weights live elsewhere,
`torch.nn.Parameter` has a ``data`` property that does what PyTorch's does and takes a note. What
``param.detach()`` or a view returns counts for the parameter, but not what an array writes that is
made of it, nor a storage: the methods that return these take a note as well, and values are
compared, since most who call them only read.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

_PLAIN = torch.Tensor.data  # the descriptor that all tensors share
_lock = threading.Lock()  # of what Parameter has: it is there while anybody watches
_watches: weakref.WeakSet[Listener] = weakref.WeakSet()
_MANY = 64


class Listener(Protocol):
    """Hears of every parameter whose memory somebody asks for, before they have it."""

    def note_data(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        """``alias`` is to be handed out as its ``data``; None: its ``data`` is to be replaced."""

    def note_alias(self, param: torch.Tensor) -> None:
        """It is to be detached, or a view, an array or a storage of it to be handed out."""


def listen(listener: Listener) -> None:
    """Let something hear for as long as it lives."""
    with _lock:
        _watches.add(listener)
        if "data" not in nn.Parameter.__dict__:
            nn.Parameter.data = property(_get, _set)  # type: ignore[assignment]
            for name, method in _telling().items():
                setattr(nn.Parameter, name, method)


class DataWatch:
    """Some parameters whose ``data`` is watched, for as long as this object lives."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        # Parameters live as long as their model, which holds this; ids need no hash of a tensor.
        self._given: dict[int, list[weakref.ref[torch.Tensor]]] = {id(p): [] for p in params}
        self._touched: set[int] = set()
        self._before: dict[int, torch.Tensor] = {}
        if self._given:
            listen(self)

    def may_have_changed(self, param: torch.Tensor) -> bool:
        """Whether its ``data`` was asked for or set since the last time, or is still in use.

        Or whether a tensor or an array of its memory was made since then, and it has other values.
        """
        key = id(param)
        given = self._given.get(key)
        if given is None:
            return False
        _forget_dead(given)
        found = bool(given) or key in self._touched
        self._touched.discard(key)
        before = self._before.pop(key, None)
        return found or (before is not None and not torch.equal(before, fingerprint(param)))

    def note_alias(self, param: torch.Tensor) -> None:
        """Note its values, the first time."""
        if id(param) in self._given and id(param) not in self._before:
            self._before[id(param)] = fingerprint(param)

    def note_data(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        """Note what is handed out."""
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


@functools.cache
def _telling() -> dict[str, Any]:
    """Methods and properties that return memory of a parameter, by what PyTorch says of operators.

    And those that are no operators.
    """
    found = {"numpy", "untyped_storage", "__dlpack__", "T", "H"}
    for schema in torch._C._jit_get_all_schemas():
        of_self = bool(schema.arguments) and schema.arguments[0].name == "self"
        kinds = [returned.alias_info for returned in schema.returns]
        if of_self and any(kind is not None and not kind.is_write for kind in kinds):
            found.add(schema.name.removeprefix("aten::"))
    names = {name for name in found if hasattr(torch.Tensor, name)} - {"data"}
    return {name: _told(getattr(torch.Tensor, name)) for name in names}


def _told(plain: Any) -> Any:
    """Return a method, or a property, that does what PyTorch's does, and tells of it before."""
    is_property = not callable(plain)
    get = plain.__get__ if is_property else plain

    @functools.wraps(get)
    def method(param: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for watch in list(_watches):
            watch.note_alias(param)
        _leave_class()
        return get(param, *args, **kwargs)

    return property(method) if is_property else method


def _tell(param: torch.Tensor, alias: torch.Tensor | None) -> None:
    for watch in list(_watches):
        watch.note_data(param, alias)
    _leave_class()


def _leave_class() -> None:
    """Let the class be as PyTorch made it where nobody watches any more."""
    with _lock:
        if not _watches and "data" in nn.Parameter.__dict__:
            for name in ("data", *_telling()):
                delattr(nn.Parameter, name)


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return what shows, as good as surely, whether a tensor has the same values as another.

    A small one is copied. Of a larger one the 64-bit words, in rows of 1,024, are summed up by row
    and by column, so that values which have changed places show as well.
    """
    plain = torch.Tensor.detach(tensor)  # a parameter's own one is watched
    flat = plain.reshape(-1).view(torch.uint8)
    num_rows = flat.numel() // (8 * _ROW)
    if num_rows < _ROWS_AT_LEAST:
        return flat.clone()
    cut = 8 * _ROW * num_rows
    grid = flat[:cut].view(torch.int64).view(num_rows, _ROW)
    return torch.cat([grid.sum(0), grid.sum(1), flat[cut:].to(torch.int64)])


_ROW = 1024
_ROWS_AT_LEAST = 8
