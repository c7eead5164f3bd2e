"""Python attributes of modules that have changed since a model was made: counters, memories."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from harmony.capture.graph.params import version_of
from harmony.capture.state.python_state import is_plain
from harmony.checkpoint.companions import is_own
from harmony.checkpoint.tree import encode
from harmony.core.warn import warn
from harmony.errors import ConfigError

Place = tuple[str, str]
"""Name of the module, name of the attribute."""

_MACHINERY = frozenset(nn.Module().__dict__) | {"_compiled_call_impl"}
_DEEPEST = 4


class _Mark(NamedTuple):
    """A thing, and what tells whether something has changed in it."""

    held: Any
    state: Any

    def same(self, other: _Mark) -> bool:
        if self.held is not other.held or type(self.state) is not type(other.state):
            return False
        both_nan = self.state != self.state and other.state != other.state
        return bool(self.state == other.state) or both_nan


class Attributes:
    """What the attributes of all modules of a model were when it was made."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._before = {place: list(_marks(held)) for place, held in _attributes(net)}

    def changed(self) -> tuple[dict[Place, Any], dict[Place, Any]]:
        """Return attributes that are others now, and the states of generators that have drawn.

        The forward may have changed them, or the script. What a checkpoint cannot hold is left
        out, with a warning.
        """
        values, generators = {}, {}
        for place, held in _attributes(self._net):
            if _same(self._before.get(place, []), list(_marks(held))):
                continue
            state = _generator_state(held)
            if state is not None:
                generators[place] = state
                continue
            try:
                encode(held, ".".join(filter(None, place)), {})
            except ConfigError as error:
                warn(f"not saved, so that a resumed run may differ: {error}")
            else:
                values[place] = held
        return values, generators


def set_attributes(
    net: nn.Module, values: Mapping[Place, Any], generators: Mapping[Place, Any]
) -> None:
    """Give modules the attributes that a checkpoint holds."""
    modules = dict(net.named_modules())
    for (module, name), value in values.items():
        setattr(modules[module], name, value)
    for (module, name), state in generators.items():
        _set_generator_state(getattr(modules[module], name), state)


def _attributes(net: nn.Module) -> Iterator[tuple[Place, Any]]:
    for path, module in net.named_modules():
        for name, held in list(module.__dict__.items()):
            if name not in _MACHINERY and not is_own(name, held):
                yield (path, name), held


def _marks(held: Any, depth: int = _DEEPEST) -> Iterator[_Mark]:
    """Everything in an attribute that may change."""
    state = _generator_state(held)
    if isinstance(held, torch.Tensor):
        yield _Mark(held, version_of(held))
    elif is_plain(held):
        yield _Mark(None, copy.deepcopy(held))
    elif state is not None:
        yield _Mark(held, repr(state if not isinstance(state, torch.Tensor) else state.tolist()))
    elif depth and isinstance(held, (list, tuple, set, frozenset, deque, dict)):
        yield _Mark(type(held), len(held))
        items = [x for pair in held.items() for x in pair] if isinstance(held, dict) else held
        for item in items:
            yield from _marks(item, depth - 1)
    else:
        yield _Mark(held, None)
        code = isinstance(held, (type, nn.Module)) or callable(held)
        if depth and not code and hasattr(held, "__dict__"):
            for item in list(vars(held).values()):
                yield from _marks(item, depth - 1)


def _same(before: list[_Mark], now: list[_Mark]) -> bool:
    if len(before) != len(now):
        return False
    return all(one.same(two) for one, two in zip(before, now, strict=True))


def _generator_state(held: Any) -> Any:
    """The state of a generator of random numbers; None for anything else."""
    if isinstance(held, torch.Generator):
        return held.get_state()
    if isinstance(held, random.Random):
        return held.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(held, numpy.random.Generator):
        return held.bit_generator.state
    if numpy is not None and isinstance(held, numpy.random.RandomState):
        return held.get_state(legacy=True)
    return None


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
