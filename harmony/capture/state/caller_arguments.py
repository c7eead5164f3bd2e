"""The caller's arguments: what a forward, or a loss, changes in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harmony.capture.graph.params import version_of
from harmony.capture.graph.structure import flatten
from harmony.capture.trace.irregular import is_packed, moves
from harmony.errors import ConfigError

_DEEPEST = 4


class Containers:
    """Lists, dictionaries and objects among the arguments of a call, as they are now."""

    def __init__(self, call: Any) -> None:
        """Remember those of ``(args, kwargs, targets)``."""
        self._known: list[tuple[str, Any, list[Any]]] = []
        self._seen: set[int] = set()
        args, kwargs, targets = call
        for index, held in enumerate(args):
            self._walk(f"args[{index}]", held, _DEEPEST)
        for key, held in kwargs.items():
            self._walk(f"kwargs[{key!r}]", held, _DEEPEST)
        self._walk("targets", targets, _DEEPEST)

    def check(self, user: str) -> None:
        """Refuse what has been changed, and put it back.

        Args:
            user: name and place of what was called.

        Raises:
            ConfigError: naming the argument.
        """
        changed = [(name, held, was) for name, held, was in self._known if _differs(held, was)]
        for _, held, was in changed:
            _put_back(held, was)
        if changed:
            raise ConfigError(
                f"{user} changes {changed[0][0]}, a {type(changed[0][1]).__name__} that it is "
                "given: it would be changed in a copy, not for the caller. Let it change a copy "
                "of its own (dict(batch), list(items), copy.copy(batch)), or return what it adds"
            )

    def _walk(self, name: str, held: Any, depth: int) -> None:
        if depth == 0 or id(held) in self._seen or isinstance(held, (torch.Tensor, str, bytes)):
            return
        self._seen.add(id(held))
        inner = list(_inner(held))
        if not isinstance(held, tuple) and (inner or isinstance(held, (list, dict))):
            self._known.append((name, held, _flat(held)))
        for part, value in inner:
            self._walk(f"{name}{part}", value, depth - 1)


def place_of(net: nn.Module) -> str:
    """Name a module's forward, with file and line."""
    code = getattr(inspect.getattr_static(type(net), "forward"), "__code__", None)
    where = "" if code is None else f" at {code.co_filename}:{code.co_firstlineno}"
    return f"the forward of {type(net).__name__}{where}"


def _inner(held: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(held, (list, tuple)):
        yield from ((f"[{index}]", value) for index, value in enumerate(held))
    elif isinstance(held, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in held.items())
    elif _is_record(held):
        yield from ((f".{key}", value) for key, value in vars(held).items())


def _is_record(held: Any) -> bool:
    """Whether an object is one of data: its attributes are what it is."""
    code = isinstance(held, (type, nn.Module, torch.Generator)) or callable(held)
    return hasattr(held, "__dict__") and not code


def _flat(held: Any) -> list[Any]:
    if isinstance(held, list):
        return list(held)
    if isinstance(held, Mapping):
        return [x for pair in held.items() for x in pair]
    return [x for pair in vars(held).items() for x in pair]


def _differs(held: Any, was: list[Any]) -> bool:
    now = _flat(held)
    return len(now) != len(was) or any(a is not b for a, b in zip(now, was, strict=True))


def _put_back(held: Any, was: list[Any]) -> None:
    if isinstance(held, list):
        held[:] = was
        return
    target = held if isinstance(held, dict) else getattr(held, "__dict__", None)
    if target is held or (target is not None and not isinstance(held, Mapping)):
        target.clear()
        target.update(zip(was[::2], was[1::2], strict=True))


class Lent:
    """Arguments on a device, where they may be changed in place: then the caller's are, too.

    Attributes:
        call: ``(args, kwargs, targets)`` there, as part of the graph.
    """

    def __init__(self, call: Any, device: torch.device) -> None:
        leaves, structure = flatten(call, is_leaf=is_packed)
        there: dict[int, tuple[Any, Any]] = {}
        for leaf in filter(moves, leaves):
            if id(leaf) not in there:
                there[id(leaf)] = (leaf, leaf.to(device))
        self.call = structure.unflatten(
            [there[id(leaf)][1] if id(leaf) in there else leaf for leaf in leaves]
        )
        pairs = [(x.data, y.data) if is_packed(x) else (x, y) for x, y in there.values()]
        self._pairs = [(leaf, copy, version_of(copy)) for leaf, copy in pairs]
        self._containers = Containers(self.call)

    @property
    def is_changed(self) -> bool:
        """Whether a tensor was changed in place."""
        return any(True for _ in self._changed())

    def check(self, user: str) -> None:
        """Refuse changes that the caller's arguments cannot have in the same way.

        Raises:
            ConfigError: naming the argument.
        """
        self._containers.check(user)
        for given, copy in self._changed():
            shape = tuple(given.shape)
            if copy.requires_grad:
                raise ConfigError(
                    f"{user} changes an input of shape {shape} in place, as part of the graph of "
                    "gradients: the caller's tensor is another one. Let it change a clone()"
                )
            others = (g for g, *_ in self._pairs if g is not given)
            if any(_memory(other) == _memory(given) for other in others):
                raise ConfigError(
                    f"{user} changes an input of shape {shape} in place, whose memory another "
                    "input shares. Pass a clone() of one of them"
                )

    def give_back(self) -> None:
        """Let the caller's tensors have what was changed."""
        with torch.no_grad():
            for given, copy in self._changed():
                given.copy_(copy)

    def _changed(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for given, copy, version in self._pairs:
            if copy is given:
                continue
            if version < 0:
                if not torch.equal(given, copy.to(given.device)):
                    yield given, copy
            elif copy._version != version:
                yield given, copy


def _memory(tensor: torch.Tensor) -> int:
    """Where its storage is; what has none shares none."""
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage().data_ptr() if strided else id(tensor)
