"""Python attributes of modules that have changed since a model was made: counters, memories."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harmony.capture.state.python_state import is_plain
from harmony.checkpoint.tree import encode
from harmony.core.warn import warn
from harmony.errors import ConfigError

Place = tuple[str, str]
"""Name of the module, name of the attribute."""

_MACHINERY = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}


class Attributes:
    """What the attributes of all modules of a model were when it was made."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._before = {place: _seen(held) for place, held in _attributes(net)}

    def changed(self) -> dict[Place, Any]:
        """Return those that are others now: of the forward's own making, or the script's.

        What a checkpoint cannot hold is left out, with a warning.
        """
        found = {}
        for place, held in _attributes(self._net):
            if place in self._before and _same(self._before[place], held):
                continue
            try:
                encode(held, ".".join(filter(None, place)), {})
            except ConfigError as error:
                warn(f"not saved: {error}")
            else:
                found[place] = held
        return found


def set_attributes(net: nn.Module, values: Mapping[Place, Any]) -> None:
    """Give modules the attributes that a checkpoint holds."""
    modules = dict(net.named_modules())
    for (module, name), value in values.items():
        setattr(modules[module], name, value)


def _attributes(net: nn.Module) -> Iterator[tuple[Place, Any]]:
    for path, module in net.named_modules():
        for name, held in list(module.__dict__.items()):
            if name not in _MACHINERY:
                yield (path, name), held


def _seen(held: Any) -> tuple[Any, Any]:
    """The thing itself, and what tells whether something has changed in it."""
    if isinstance(held, torch.Tensor):
        return held, 0 if held.is_inference() else held._version
    if is_plain(held):
        return copy.copy(held), None
    if isinstance(held, (list, tuple)):
        return held, [id(item) for item in held]
    if isinstance(held, dict):
        return held, [id(item) for pair in held.items() for item in pair]
    return held, None


def _same(before: tuple[Any, Any], held: Any) -> bool:
    was, mark = before
    if isinstance(held, torch.Tensor) or not is_plain(held):
        return held is was and _seen(held)[1] == mark
    return type(was) is type(held) and bool(was == held or (was != was and held != held))
