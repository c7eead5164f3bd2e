"""The Python objects that a forward can reach: walked, remembered, compared, put back.

The walk begins with a module tree, a loss function and the globals that the code which ran names.
It goes on through attributes that the code names, containers, closures and defaults.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from harmony.capture.guards.holders import (
    ATOMS,
    MISSING,
    Array,
    Content,
    Entry,
    Holder,
    Names,
    Whole,
    first_changed,
)
from harmony.capture.guards.observe import Observed, global_names, reads_by_text
from harmony.capture.guards.opaque import opaque_state

MOST = 20_000
"""Objects that a walk looks at, at most."""

_LARGE = 10_000
"""Entries of a container from which on only their number counts."""

_MACHINERY = frozenset(nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATEFUL = (torch.Generator, random.Random)
_LEFT_ALONE = frozenset({"logging", "threading", "_thread", "weakref", "re", "typing", "inspect"})
_LEFT_ALONE |= {"importlib", "_frozen_importlib_external", "_frozen_importlib", "harmony"}
_GLOBAL_RANDOM = getattr(random, "_inst", None)
"""Python's own generator, whose state is compared elsewhere."""

_PATCHED = (nn.Module, torch.Tensor, torch.autograd.Function, torch.jit.ScriptFunction)
"""Classes that a recording changes itself while it is on."""

_FUNCTIONS: dict[str, Any] = vars(torch.nn.functional)
"""Of all of torch, what programs replace: attention, above all."""

_PLACES = ("__code__", "__defaults__", "__kwdefaults__")


class World:
    """What a forward may read or write beside its inputs, parameters and buffers, at one moment.

    Attributes:
        holders: of all values that were found.
        hidden: names of objects with a state that cannot be looked at: iterators, generators.
    """

    def __init__(self, holders: list[Holder], hidden: list[str]) -> None:
        self.holders = holders
        self.hidden = hidden
        self._checks = [holder.same for holder in holders]

    def same(self) -> bool:
        """Whether everything is as it was."""
        for check in self._checks:  # noqa: SIM110  quicker: it runs before every step
            if not check():
                return False
        return True

    def changed(self) -> str | None:
        """Name the first thing that is not as it was."""
        holder = first_changed(self.holders)
        return None if holder is None else holder.name

    def without(self, names: Collection[str]) -> World:
        """Return it without what has one of these names."""
        return World([holder for holder in self.holders if holder.name not in names], self.hidden)

    def restore(self) -> None:
        """Put everything back, as far as it can be."""
        for holder in self.holders:
            holder.restore()


class Walk:
    """One walk.

    Attributes:
        holders, hidden: as of `World`.
        functions: the functions that it came to.
        attributes: of modules: holder, name of the module, attribute.
    """

    def __init__(self, observed: Observed, ignored: Iterable[Any] = ()) -> None:
        """Walk along the names in the code that ran.

        Args:
            ignored: objects to leave alone: parameters and buffers.
        """
        self.holders: list[Holder] = []
        self.hidden: list[str] = []
        self.functions: list[FunctionType] = []
        self.attributes: list[tuple[Entry, str, str]] = []
        self._codes = observed.codes
        named = (name for name in observed.names() if name[:2] != "__")
        self._names = frozenset((*named, "forward"))
        self._seen = {id(held) for held in ignored}
        self._entries: set[tuple[int, str]] = set()
        self._alive: list[Any] = []
        self._modules: dict[str, nn.Module] = {}
        self._pending: deque[tuple[str, Any]] = deque()

    def world(self) -> World:
        """Return what was found."""
        return World(self.holders, self.hidden)

    def modules(self, root: nn.Module, moving: Collection[tuple[str, str]] = ()) -> None:
        """Walk over a module tree: all attributes, since they are the model's own.

        Args:
            moving: attributes that the forward itself changes: module, attribute.
        """
        self._seen.update(map(id, root.modules()))
        self._modules = dict(root.named_modules())
        for path, module in root.named_modules():
            where = f"{path or type(root).__name__}."
            held = module.__dict__
            if isinstance(module, torch.jit.ScriptModule):  # compiled
                continue
            among = _Names(path, moving, _is_torchs(type(module)))
            for name, value in list(held.items()):
                if name in among:
                    entry = self._entry(where + name, held, name, value)
                    if entry is not None:
                        self.attributes.append((entry, path, name))
            about = f"an attribute of {where[:-1]}"
            self.holders.append(Names(about, held, among, nn.Module))
            for hooks in _HOOKS:
                for hook in list(held[hooks].values()):
                    self.visit(f"a hook of {where[:-1]}", hook)
            self.visit(type(module).__name__, type(module))
        self._run()

    def owners(self) -> Iterator[tuple[Entry, nn.Module, str]]:
        """Yield the attributes of modules: holder, module, attribute."""
        for entry, path, name in self.attributes:
            yield entry, self._modules[path], name

    def code(self, codes: Mapping[CodeType, dict[str, Any]]) -> None:
        """Walk over the globals that code names, as a global or, where it may, by a text."""
        texts = Observed(dict(codes)).names() if any(map(reads_by_text, codes)) else frozenset()
        for code, names in list(codes.items()):
            named = [name for name in code.co_names if name in names and name[:2] != "__"]
            for name in global_names(code) if named else ():
                if name in named:
                    self._entry(name, names, name, names[name])
            if reads_by_text(code):
                for name in sorted(texts.intersection(names)):
                    if name[:2] != "__":
                        self._entry(name, names, name, names[name])
            for name in code.co_names:
                if name in _FUNCTIONS and (id(_FUNCTIONS), name) not in self._entries:
                    self._entries.add((id(_FUNCTIONS), name))
                    about = f"torch.nn.functional.{name}"
                    self.holders.append(Entry(about, _FUNCTIONS.get, name, _putter(_FUNCTIONS)))
        self._run()

    def root(self, name: str, held: Any) -> None:
        """Walk from one more object."""
        self.visit(name, held)
        self._run()

    def visit(self, name: str, held: Any) -> None:
        """Go to an object later, unless it is plain or was visited."""
        if isinstance(held, ATOMS) or id(held) in self._seen or len(self._seen) > MOST:
            return
        opaque = opaque_state(name, held)
        left_alone = _home_of(type(held)).split(".")[0] in _LEFT_ALONE or held is _GLOBAL_RANDOM
        if opaque is None and left_alone:
            return
        self._seen.add(id(held))
        self._alive.append(held)
        if opaque is None:
            self._pending.append((name, held))
            return
        self.holders.append(opaque)
        for inner in (*opaque.held, getattr(held, "__wrapped__", None)):
            self.visit(name, inner)

    def _run(self) -> None:
        while self._pending:
            name, held = self._pending.popleft()
            self._enter(name, held)

    def _entry(self, name: str, holder: dict[str, Any], key: str, value: Any) -> Entry | None:
        place = (id(holder), key)
        if place in self._entries:
            return None
        self._entries.add(place)
        entry = Entry(name, holder.get, key, _putter(holder))
        self.holders.append(entry)
        self.visit(name, value)
        return entry

    def _attribute(self, name: str, owner: Any, key: str) -> None:
        """An attribute that is in no dictionary: of a class, a slot, of a function."""

        def get(key: str, default: Any) -> Any:
            return getattr(owner, key, default)

        def put(key: str, value: Any) -> None:
            delattr(owner, key) if value is MISSING else setattr(owner, key, value)

        self.holders.append(Entry(name, get, key, put))
        self.visit(name, getattr(owner, key, None))

    def _enter(self, name: str, held: Any) -> None:
        kind = type(held)
        if isinstance(held, torch.Tensor):
            self.holders.append(Content(name, held))
        elif isinstance(held, ModuleType):
            self._named(name, held, vars(held))
        elif isinstance(held, type):
            self._class(held)
        elif isinstance(held, FunctionType):
            self._function(name, held)
        elif isinstance(held, MethodType):
            self.visit(name, held.__func__)
            self.visit(name, held.__self__)
        elif isinstance(held, functools.partial):
            self.visit(name, held.func)
            for part in (held.args, held.keywords):
                self.visit(name, part)
        elif isinstance(held, (staticmethod, classmethod)):
            self.visit(name, held.__func__)
        elif isinstance(held, property):
            self.visit(name, held.fget)
        elif _home_of(kind) == "numpy" and kind.__name__ == "ndarray":
            self.holders.append(Array(name, held))
        elif isinstance(held, (tuple, frozenset)):
            for inner in held:
                self.visit(name, inner)
            self._attributes(name, held)
        elif isinstance(held, (dict, list, set, deque)):
            self._container(name, held)
            self._attributes(name, held)
        elif isinstance(held, _STATEFUL) or _is_iterator(kind):
            self.hidden.append(name)
        elif _home_of(kind).startswith("numpy.random") and hasattr(held, "bytes"):
            if held is not sys.modules["numpy"].random.mtrand._rand:  # compared elsewhere
                self.hidden.append(name)
        else:
            self._attributes(name, held)

    def _container(self, name: str, held: Any) -> None:
        if len(held) > _LARGE:
            self.holders.append(Names(name, held, ()))
            return
        self.holders.append(Whole(name, held))
        if isinstance(held, dict):
            for key, value in list(held.items()):
                self.visit(f"{name}[{key!r}]" if isinstance(key, ATOMS) else name, value)
        else:
            for index, value in enumerate(list(held)):
                self.visit(f"{name}[{index}]", value)

    def _attributes(self, name: str, held: Any) -> None:
        """An object's own attributes, as far as the code names them, and its class."""
        own = getattr(held, "__dict__", None)
        if isinstance(own, dict):
            self._named(name, held, own)
        if isinstance(held, nn.Module):
            self._module(name, held)
        kind = type(held)
        for base in kind.__mro__:
            slots = base.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot in self._names and not isinstance(held, type):
                    self._attribute(f"{name}.{slot}", held, slot)
        self.visit(kind.__name__, kind)

    def _module(self, name: str, held: nn.Module) -> None:
        """What a module that is none of the model's holds: a loss function's buffers, say."""
        if "_buffers" not in held.__dict__ or isinstance(held, torch.jit.ScriptModule):
            return
        buffers = held._buffers
        for key, buffer in list(buffers.items()):
            self._entry(f"{name}.{key}", buffers, key, buffer)
        self.holders.append(Names(f"a buffer of {name}", buffers, frozenset(buffers)))
        for key, child in held._modules.items():
            self.visit(f"{name}.{key}", child)

    def _named(self, name: str, held: Any, own: dict[str, Any]) -> None:
        if isinstance(held, ModuleType):
            package = held.__name__.split(".")[0]
            pythons = package in sys.stdlib_module_names and package != "os"
            if pythons or package in ("torch", "harmony"):
                return
        for key in [key for key in own if key in self._names]:
            self._entry(f"{name}.{key}", own, key, own[key])
        self.holders.append(Names(f"an attribute of {name}", own, self._names))

    def _class(self, kind: type) -> None:
        home = _home_of(kind)
        layers = home.startswith(("torch.nn.modules", "torch.nn.utils"))
        package = home.split(".")[0]
        if package in sys.stdlib_module_names or (package == "torch" and not layers):
            return
        if kind in _PATCHED:
            return
        own = vars(kind)
        for key in [key for key in own if key in self._names]:
            holder = Entry(f"{kind.__name__}.{key}", own.get, key, _class_putter(kind))
            self.holders.append(holder)
            self.visit(f"{kind.__name__}.{key}", own[key])
        self.holders.append(Names(f"an attribute of {kind.__name__}", own, self._names))
        for base in kind.__mro__[1:]:
            self.visit(base.__name__, base)

    def _function(self, name: str, held: FunctionType) -> None:
        self.functions.append(held)
        if held.__code__ not in self._codes:
            wrapped = getattr(held, "__wrapped__", None)
            if wrapped is not None:
                self.visit(name, wrapped)
            return
        for place in _PLACES:
            self._attribute(f"{name}.{place}", held, place)
        if held.__dict__:
            self._named(name, held, held.__dict__)
        for variable, cell in zip(held.__code__.co_freevars, held.__closure__ or (), strict=True):
            self._cell(variable, cell)

    def _cell(self, name: str, cell: CellType) -> None:
        if id(cell) in self._seen:
            return
        self._seen.add(id(cell))
        self._alive.append(cell)

        def get(_: Any, default: Any) -> Any:
            try:
                return cell.cell_contents
            except ValueError:  # still empty
                return default

        def put(_: Any, value: Any) -> None:
            cell.cell_contents = value

        self.holders.append(Entry(name, get, name, put))
        self.visit(name, get(name, None))


class _Names:
    """The names of a module's attributes that are its own and do not move by themselves.

    What PyTorch's own layers keep for themselves, such as lists of their parameters, is not.
    """

    def __init__(self, path: str, moving: Collection[tuple[str, str]], torchs: bool) -> None:
        self._path, self._moving, self._torchs = path, moving, torchs

    def __contains__(self, name: object) -> bool:
        private = self._torchs and str(name)[:1] == "_"
        return not private and name not in _MACHINERY and (self._path, name) not in self._moving


def _is_torchs(kind: type) -> bool:
    return _home_of(kind).startswith("torch.nn.modules.")


def _putter(holder: dict[str, Any]) -> Callable[[Any, Any], Any]:
    def put(key: str, value: Any) -> None:
        if value is MISSING:
            holder.pop(key, None)
        else:
            holder[key] = value

    return put


def _class_putter(kind: type) -> Callable[[Any, Any], Any]:
    def put(key: str, value: Any) -> None:
        delattr(kind, key) if value is MISSING else setattr(kind, key, value)

    return put


def _is_iterator(kind: type) -> bool:
    return hasattr(kind, "__next__") and _home_of(kind) in ("builtins", "itertools", "_csv")


def _home_of(kind: type) -> str:
    """The name of the Python module that a class is from."""
    found = getattr(kind, "__module__", "")
    return found if isinstance(found, str) else ""
