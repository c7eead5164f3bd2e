"""Plain Python attributes of modules: counters, schedules, switches."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn

_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size)
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_MISSING = object()


def plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of one module, without its children, that hold plain values.

    Its mode, numbers, texts, and containers of nothing else; what PyTorch keeps on each module
    beside the mode is left out.
    """
    for name, held in list(module.__dict__.items()):
        if name not in _MACHINERY and is_plain(held):
            yield name, held


def is_plain(held: Any) -> bool:
    """Whether a value is a number, a text, or a container of such."""
    if isinstance(held, _PLAIN):
        return True
    if isinstance(held, dict):
        return all(map(is_plain, held.values()))
    return isinstance(held, _CONTAINERS) and all(map(is_plain, held))


class PlainState:
    """The plain attributes of some modules, each without its children, at one moment."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        chosen = list(modules)
        self._held = {module: dict(_copied(module)) for module in chosen}
        self._lengths = {module: dict(_lengths(module)) for module in chosen}

    def changes(self) -> list[tuple[nn.Module, str]]:
        """Return which attributes have changed to another plain value: module and attribute."""
        found = []
        for module, before in self._held.items():
            now = dict(plain_attributes(module))
            for attribute in {**before, **now}:
                one, two = before.get(attribute, _MISSING), now.get(attribute, _MISSING)
                turned = two is _MISSING and attribute in module.__dict__
                if not turned and not _same(one, two):
                    found.append((module, attribute))
        return found

    def grown(self) -> list[str]:
        """Return the attributes that are containers in which there are other objects now."""
        return [
            attribute
            for module, before in self._lengths.items()
            for attribute, length in _lengths(module)
            if before.get(attribute, 0) != length
        ]


class HeldFromOutside:
    """The attributes of some modules at one moment, to see whether another has set them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._plain = PlainState(self._modules)
        self._objects = [dict(_objects(module)) for module in self._modules]

    def changed(self) -> str | None:
        """Name an attribute that was set since; None if there is none."""
        for _, attribute in self._plain.changes():
            return attribute
        for module, before in zip(self._modules, self._objects, strict=True):
            now = dict(_objects(module))
            for attribute in {**before, **now}:
                if before.get(attribute, _MISSING) is not now.get(attribute, _MISSING):
                    return attribute
        return None


def _objects(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that are not plain."""
    for name, held in list(module.__dict__.items()):
        if name not in _MACHINERY and not is_plain(held):
            yield name, held


def _copied(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, held in plain_attributes(module):
        yield name, copy.copy(held) if isinstance(held, _CONTAINERS) else held


def _lengths(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Lengths of the containers that hold something that is not plain."""
    for name, held in list(module.__dict__.items()):
        if name in _MACHINERY or not isinstance(held, _CONTAINERS) or is_plain(held):
            continue
        if isinstance(held, Sized):
            yield name, len(held)


def _same(one: Any, two: Any) -> bool:
    if one is _MISSING or two is _MISSING:
        return one is two
    return type(one) is type(two) and bool(one == two or (one != one and two != two))
