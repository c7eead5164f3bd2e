"""Plain values that the code of a class reaches outside of its objects.

A step may count in a global variable, append to a list of a closure, or keep something on its
class. Who tries it puts such values back, and learns that there are any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_NO_OBJECTS = (type, ModuleType, FunctionType, torch.Tensor)
_MANY = 10_000
"""Items of a container that is too large to be compared at every step."""


class PythonReach:
    """Globals, closures and class attributes that the methods of a class name, and their values.

    Values that are plain, lists, sets and dictionaries, and the attributes of objects that the
    names stand for, and of those that these hold: a module, a writer of logs.
    """

    def __init__(self, kind: type) -> None:
        places = [place for found in _places(kind) for place in (found, *_inside(found.get()))]
        self._held = [place for place in places if _is_plain(place.get())]
        self._before = [copy.copy(place.get()) for place in self._held]

    def changed(self) -> bool:
        """Whether one of them is not what it was."""
        pairs = zip(self._held, self._before, strict=True)
        return any(not _same(place.get(), before) for place, before in pairs)

    def restore(self) -> None:
        """Let all of them be what they were, the same objects."""
        for place, before in zip(self._held, self._before, strict=True):
            if not _same(place.get(), before):
                place.put(before)


class _Place:
    """Where a value is held."""

    def __init__(self, get: Callable[[], Any], rebind: Callable[[Any], None]) -> None:
        self.get = get
        self._rebind = rebind
        self._object = get()

    def put(self, value: Any) -> None:
        """Give the object that was there its content back, and put it there."""
        held = self._object
        if isinstance(held, list):
            held[:] = value
        elif isinstance(held, (set, dict)):
            held.clear()
            held.update(value)
        else:
            held = value
        self._rebind(held)


def _places(kind: type) -> Iterator[_Place]:
    for owner in kind.__mro__:
        if owner is object or owner.__module__.partition(".")[0] == "torch":
            continue
        for name, held in list(vars(owner).items()):
            function = _function(held)
            if function is not None:
                yield from _reached(function)
            elif not name.startswith("__"):
                yield _Place(_attribute(owner, name), _attribute_setter(owner, name))


def _inside(held: Any, depth: int = 2) -> Iterator[_Place]:
    """The attributes of an object, and of the objects that it holds."""
    attributes = getattr(held, "__dict__", None)
    if not isinstance(attributes, dict) or isinstance(held, _NO_OBJECTS) or not depth:
        return
    for name in list(attributes):
        yield _Place(_item(attributes, name), _item_setter(attributes, name))
        yield from _inside(attributes[name], depth - 1)


def _function(held: Any) -> FunctionType | None:
    """The function behind decorators."""
    held = getattr(held, "__func__", held)
    while hasattr(held, "__wrapped__"):
        held = held.__wrapped__
    return held if isinstance(held, FunctionType) else None


def _reached(function: FunctionType) -> Iterator[_Place]:
    names = function.__globals__
    for name in function.__code__.co_names:
        if name in names:
            yield _Place(_item(names, name), _item_setter(names, name))
    for cell in function.__closure__ or ():
        if _filled(cell):
            yield _Place(_content(cell), _content_setter(cell))


def _filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _attribute(owner: type, name: str) -> Callable[[], Any]:
    return lambda: vars(owner).get(name)


def _attribute_setter(owner: type, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


def _item(names: MutableMapping[str, Any], name: str) -> Callable[[], Any]:
    return lambda: names.get(name)


def _item_setter(names: MutableMapping[str, Any], name: str) -> Callable[[Any], None]:
    return lambda value: names.__setitem__(name, value)


def _content(cell: CellType) -> Callable[[], Any]:
    return lambda: cell.cell_contents


def _content_setter(cell: CellType) -> Callable[[Any], None]:
    return lambda value: setattr(cell, "cell_contents", value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, set, dict)):
        return type(value).__module__ in ("builtins", "collections") and len(value) <= _MANY
    return isinstance(value, _PLAIN)


def _same(one: Any, other: Any) -> bool:
    """Whether a container holds the same objects still, or a plain value is equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        same_keys = list(one) == list(other)
        return same_keys and all(one[key] is other[key] for key in one)
    if isinstance(one, _PLAIN) and one != one:
        return bool(other != other)
    return bool(one == other)
