"""Holders of values that a forward may read: each can tell whether it is as it was, and go back.

The checks run before every step, one after the other, so they are short: identity first, then
equality of plain values.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from harmony.capture.graph.params import version_of

MISSING: Any = object()
ATOMS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), range, slice)
ATOMS += (torch.dtype, torch.Size, torch.device, torch.layout, type(Ellipsis))
SMALL = 4096
"""Entries of a tensor or array that are compared one by one: version counters miss ``.data``."""


class Entry:
    """A value under a key: of a dictionary, of an object's attributes, of a function."""

    __slots__ = ("_get", "_key", "_put", "expected", "name")

    def __init__(
        self, name: str, get: Callable[[Any, Any], Any], key: str, put: Callable[[Any, Any], Any]
    ) -> None:
        self.name = name
        self._get, self._key, self._put = get, key, put
        self.expected = get(key, MISSING)

    def same(self) -> bool:
        """Whether the same value, or an equal plain one, is there."""
        found, expected = self._get(self._key, MISSING), self.expected
        return found is expected or equal_atoms(found, expected)

    def found(self) -> Any:
        """What is there now."""
        return self._get(self._key, MISSING)

    def put(self, value: Any) -> None:
        """Put a value there."""
        self._put(self._key, value)

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Put another value in its place, where the function gives another."""
        found = self.found()
        if found is not MISSING and (new := other(found)) is not found:
            self._put(self._key, new)

    def restore(self) -> None:
        """Put the value back."""
        if self.found() is not self.expected:
            self._put(self._key, self.expected)


class Whole:
    """All that a list, set, deque or dictionary holds."""

    __slots__ = ("container", "held", "name")

    def __init__(self, name: str, container: Any) -> None:
        self.name = name
        self.container = container
        self.held = listed(container)

    def same(self) -> bool:
        """Whether it holds the same objects, or equal plain values, in the same order."""
        container, held = self.container, self.held
        if len(container) * (2 if isinstance(container, dict) else 1) != len(held):
            return False
        now = listed(container)
        return all(a is b or equal_atoms(a, b) for a, b in zip(now, held, strict=True))

    def new_items(self) -> list[tuple[Any, Any]]:
        """Keys and values that a dictionary has got since."""
        if not isinstance(self.container, dict):
            return []
        known = set(self.held[::2])
        return [item for item in self.container.items() if item[0] not in known]

    def putter(self, key: Any) -> Callable[[Any], None]:
        """Return what puts a value under a key."""
        return functools.partial(self.container.__setitem__, key)

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Put other objects in the place of those for which the function gives others."""
        now = listed(self.container)
        new = [other(held) for held in now]
        if any(a is not b for a, b in zip(now, new, strict=True)):
            self._fill(new)

    def restore(self) -> None:
        """Let it hold the same again."""
        if not self.same():
            self._fill(self.held)

    def _fill(self, held: list[Any]) -> None:
        container = self.container
        if isinstance(container, dict):
            pairs = zip(held[::2], held[1::2], strict=True)
            if list(container) == held[::2]:
                container.update(pairs)
                return
            container.clear()
            container.update(pairs)
        elif isinstance(container, list):
            container[:] = held
        else:
            container.clear()
            (container.extend if hasattr(container, "extend") else container.update)(held)


class Names:
    """Which of some names an object or class has."""

    __slots__ = ("_among", "_attributes", "_found", "_length", "name", "owner")

    def __init__(
        self, name: str, attributes: Any, among: Container[str], owner: type | None = None
    ) -> None:
        self.name, self.owner = name, owner
        self._attributes, self._among = attributes, among
        self._length, self._found = len(attributes), self._now()

    def _now(self) -> set[str]:
        return {name for name in self._attributes if name in self._among}

    def same(self) -> bool:
        """Whether none was added or deleted."""
        if len(self._attributes) == self._length:
            return True
        if self._now() != self._found:
            return False
        self._length = len(self._attributes)
        return True

    def added(self) -> list[Any]:
        """The values of the names that were added; of one that was deleted, ``MISSING``."""
        now = self._now()
        gone = [MISSING for _ in self._found - now]
        return [self._attributes[name] for name in now - self._found] + gone

    def new_items(self) -> list[tuple[str, Any]]:
        """Names that were added, and their values, where they can be put elsewhere."""
        if not isinstance(self._attributes, dict):
            return []
        return [(name, self._attributes[name]) for name in self._now() - self._found]

    def putter(self, name: str) -> Callable[[Any], None]:
        """Return what gives a name its value."""
        return functools.partial(self._attributes.__setitem__, name)

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Nothing: the values have holders of their own."""

    def restore(self) -> None:
        """Delete what was added."""
        if isinstance(self._attributes, dict):
            for name in self._now() - self._found:
                del self._attributes[name]


class Content:
    """The content of a tensor: its entries if it is small, else its version and place."""

    __slots__ = ("_entries", "_place", "_tensor", "_version", "name")

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name = name
        self._tensor = tensor
        self._version, self._place = _state(tensor)
        plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
        small = plain and tensor.numel() <= SMALL
        self._entries = tensor.detach().clone() if small else None

    def same(self) -> bool:
        """Whether nobody has written to it."""
        tensor, entries = self._tensor, self._entries
        if entries is None:
            return _state(tensor) == (self._version, self._place)
        alike = tensor.shape == entries.shape and tensor.dtype is entries.dtype
        return alike and _same_entries(tensor.detach(), entries)

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Nothing: it is what it is."""

    def restore(self) -> None:
        """Write the entries back."""
        if self._entries is not None and not self.same():
            with torch.no_grad():
                self._tensor.copy_(self._entries)


class Array:
    """The content of a NumPy array."""

    __slots__ = ("_array", "_bytes", "_form", "name")

    def __init__(self, name: str, array: Any) -> None:
        self.name = name
        self._array = array
        self._form = (array.shape, array.dtype, array.ctypes.data)
        self._bytes = array.tobytes() if array.size <= 16 * SMALL else None

    def same(self) -> bool:
        """Whether nobody has written to it; of a large one only its place is known."""
        array = self._array
        if (array.shape, array.dtype, array.ctypes.data) != self._form:
            return False
        return self._bytes is None or array.tobytes() == self._bytes

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Nothing: it is what it is."""

    def restore(self) -> None:
        """Write the entries back."""
        if self._bytes is not None and not self.same():
            numpy = sys.modules["numpy"]
            shape, dtype, _ = self._form
            self._array[...] = numpy.frombuffer(self._bytes, dtype).reshape(shape)


Puts = Callable[[list[Any]], None]


class Opaque:
    """What an object holds, as a list."""

    __slots__ = ("_get", "_put", "held", "name")

    def __init__(self, name: str, get: Callable[[], Iterable[Any]], put: Puts | None) -> None:
        self.name = name
        self._get, self._put = get, put
        self.held = list(get())

    def same(self) -> bool:
        """Whether it holds the same objects, or equal plain values."""
        now = list(self._get())
        pairs = zip(now, self.held, strict=False)
        return len(now) == len(self.held) and all(a is b or equal_atoms(a, b) for a, b in pairs)

    def replace(self, other: Callable[[Any], Any]) -> None:
        """Put other objects in the place of those for which the function gives others."""
        now = list(self._get())
        new = [other(held) for held in now]
        if self._put is not None and any(a is not b for a, b in zip(now, new, strict=True)):
            self._put(new)

    def restore(self) -> None:
        """Let it hold the same again, where that can be done."""
        if self._put is not None and not self.same():
            self._put(self.held)


Holder = Entry | Whole | Names | Content | Array | Opaque


def equal_atoms(one: Any, two: Any) -> bool:
    """Whether two values are plain, of one type, and equal; NaN equals NaN."""
    kind = type(one)
    if kind is tuple and type(two) is tuple:
        return len(one) == len(two) and all(map(equal_atoms, one, two))
    if kind is not type(two) or not isinstance(one, ATOMS):
        return False
    return bool(one == two or (one != one and two != two))


def first_changed(holders: Iterable[Holder]) -> Holder | None:
    """Return the first holder that is not as it was, if any."""
    for holder in holders:
        if not holder.same():
            return holder
    return None


def listed(container: Any) -> list[Any]:
    """All that a container holds, keys and values one after the other."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    plain = tensor.layout is torch.strided and tensor.device.type != "meta"
    return version_of(tensor), tensor.data_ptr() if plain and type(tensor) is torch.Tensor else 0


def _same_entries(one: torch.Tensor, two: torch.Tensor) -> bool:
    if torch.equal(one, two):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    return bool(((one == two) | (one.isnan() & two.isnan())).all())
