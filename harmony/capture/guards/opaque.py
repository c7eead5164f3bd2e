"""Objects of Python's own whose state is in no attribute: what they hold, to be compared.

Cells of threads and contexts, weak references, views of dictionaries, memory that C owns.
"""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import functools
import threading
import types
import weakref
from typing import Any

from harmony.capture.guards.holders import MISSING, Opaque, Puts, listed

_SMALL = 1 << 16
"""Bytes of memory that are compared one by one."""

_MAPPINGS = (collections.UserDict, collections.ChainMap, types.MappingProxyType)
_WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_SEQUENCES = (collections.UserList, weakref.WeakSet)
_C_DATA = (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array)


def opaque_state(name: str, held: Any) -> Opaque | None:
    """Return a holder of an object's state, or None for an object of another kind."""
    if isinstance(held, threading.local):
        return Opaque(name, lambda: listed(vars(held)), lambda old: _fill(vars(held), old))
    if isinstance(held, contextvars.ContextVar):
        return Opaque(name, lambda: (held.get(MISSING),), lambda old: _set(held, old[0]))
    if isinstance(held, weakref.ref):
        return Opaque(name, lambda: (held(),), None)
    if isinstance(held, threading.Event):
        return Opaque(
            name, lambda: (held.is_set(),), lambda old: held.set() if old[0] else held.clear()
        )
    if isinstance(held, (*_MAPPINGS, *_WEAK)):
        return Opaque(name, lambda: listed(dict(held.items())), _puts(held))
    if isinstance(held, _SEQUENCES):
        return Opaque(name, lambda: sorted(held, key=id) if _is_set(held) else held, None)
    if isinstance(held, functools._lru_cache_wrapper):  # what it has learnt may be forgotten
        before = held.cache_info().misses
        return Opaque(name, lambda: (held.cache_info().misses >= before,), None)
    if isinstance(held, (bytearray, array.array, *_C_DATA)):
        return _memory(name, held)
    return None


def _is_set(held: Any) -> bool:
    return isinstance(held, weakref.WeakSet)


def _memory(name: str, held: Any) -> Opaque:
    nbytes = memoryview(held).nbytes

    def put(old: list[Any]) -> None:
        place = (ctypes.c_char * nbytes).from_buffer(held)
        ctypes.memmove(place, old[0], nbytes)

    if nbytes > _SMALL:
        return Opaque(name, lambda: (memoryview(held).nbytes,), None)
    return Opaque(name, lambda: (bytes(memoryview(held)),), put)


def _set(variable: contextvars.ContextVar[Any], value: Any) -> None:
    if value is not MISSING:
        variable.set(value)


def _puts(held: Any) -> Puts | None:
    if isinstance(held, (collections.UserDict, *_WEAK)):
        return lambda old: _fill(held, old)
    return None


def _fill(mapping: Any, held: list[Any]) -> None:
    mapping.clear()
    mapping.update(zip(held[::2], held[1::2], strict=True))
