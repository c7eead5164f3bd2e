"""What a model's construction does to its parameters, written down instead of done.

Inside `recording` a parameter becomes a tensor on the meta device as soon as a module registers
it, and every operation is noted: the ones that make tensors, the ones that write to them, and all
random ones, in order. Running the notes again (`harmony.weights.init_replay`) gives the parameters
the very values that the construction would have given them, with whatever code it initialises
them.

Tensors are noted as ranges of numbered storages, so that views and ``.data`` need no notes. All
tensors but the parameters stay real: buffers keep their values.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import TreeSpec, tree_flatten

StorageKey = StorageWeakRef
"""What identifies a storage, also after it is gone."""

_BLANK = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
_LIKE = frozenset({"empty_like", "zeros_like", "ones_like", "full_like"})
_LIKE |= {"new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"}

SEEDED = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class TensorRef:
    """A tensor: a range of a numbered storage; stride and offset in elements."""

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class GeneratorRef:
    """A random generator that was passed explicitly."""

    index: int


@dataclass(frozen=True)
class Entry:
    """One operation.

    Attributes:
        leaves: its flattened arguments, tensors as ``TensorRef`` or, if nobody knows how they
            were made, as a copy.
        made: storages that it makes: position among its flattened results, and number.
        writes: numbers of the storages that it writes to.
        random: whether it draws from the default generator.
        blank: whether what it makes has no content yet, like that of ``torch.empty``.
    """

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    spec: TreeSpec
    made: tuple[tuple[int, int], ...]
    writes: tuple[int, ...]
    random: bool
    blank: bool

    @property
    def reads(self) -> set[int]:
        """Numbers of the storages that it is given."""
        return {leaf.number for leaf in self.leaves if isinstance(leaf, TensorRef)}


@dataclass
class Storage:
    """What is known of a numbered storage.

    Attributes:
        written: whether anything has given it content.
        drawn: whether its content depends on random numbers.
        deferred: whether it stands for a parameter, without memory.
    """

    nbytes: int
    written: bool = False
    drawn: bool = False
    deferred: bool = False


@dataclass
class InitLog:
    """The notes.

    Attributes:
        entries: in order.
        storages: by number.
        state: of the default generator when they began.
        generators: states of the explicitly passed generators at their first use.
    """

    entries: list[Entry] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    state: torch.Tensor = field(default_factory=torch.get_rng_state)
    generators: list[torch.Tensor] = field(default_factory=list)
    suspended: bool = False
    _numbers: dict[StorageKey, int] = field(default_factory=dict)
    _generators: dict[int, tuple[int, torch.Generator]] = field(default_factory=dict)

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage, if it is known how that was made."""
        key = _key(tensor)
        return None if key is None else self._numbers.get(key)

    def add(self, tensor: torch.Tensor) -> int:
        """Give the storage of a tensor a number."""
        nbytes = tensor.untyped_storage().nbytes()
        self.storages.append(Storage(nbytes, deferred=tensor.is_meta))
        self._numbers[key_of(tensor)] = len(self.storages) - 1
        return len(self.storages) - 1

    def forget(self, tensor: torch.Tensor) -> None:
        """From now on the tensor's content counts, not how it was made."""
        key = _key(tensor)
        if key is not None:
            self._numbers.pop(key, None)

    def forget_drawn(self) -> None:
        """Keep all content drawn so far: Python has looked at some, and what follows depends."""
        for key, number in list(self._numbers.items()):
            if self.storages[number].drawn and not self.storages[number].deferred:
                del self._numbers[key]

    def reference(self, tensor: torch.Tensor) -> Any:
        """What to note for a tensor: its place, or a copy if it is not known how it was made."""
        number = self.number_of(tensor)
        if number is None:
            if not tensor.is_meta or _key(tensor) is None:
                return tensor.detach().clone()
            number = self.add(tensor)
        return reference_to(tensor, number)

    def generator(self, generator: torch.Generator) -> Any:
        """What to note for a generator; the default one is meant if none is given."""
        if generator is torch.default_generator:
            return None
        if id(generator) not in self._generators:
            self.generators.append(generator.get_state())
            self._generators[id(generator)] = (len(self.generators) - 1, generator)
        return GeneratorRef(self._generators[id(generator)][0])

    def shadow(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the meta device that stands for a real one from now on."""
        number = self.number_of(tensor)
        if number is None:
            number = self._keep(tensor)
        nbytes = self.storages[number].nbytes
        bytes_ = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        self._numbers[key_of(bytes_)] = number
        self.storages[number].deferred = True
        return torch.empty(0, dtype=tensor.dtype, device="meta").set_(
            bytes_.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def _keep(self, tensor: torch.Tensor) -> int:
        """Note the content of a storage, since it is not known how that came about."""
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        whole = tensor.detach().as_strided((size,), (1,), 0)
        number = self.add(tensor)
        self.storages[number].written = True
        leaves, spec = tree_flatten(((whole.clone(),), {}))
        made = ((0, number),)
        self.entries.append(Entry(torch.clone, tuple(leaves), spec, made, (), False, False))
        return number

    def note(self, call: Call, out: Any) -> None:
        """Note an operation that has run, or that was kept back, with its results."""
        made = []
        content = not is_blank(call.func)
        given = () if takes_only_form(call.func) else call.leaves
        drawn = call.random or any(
            self.storages[leaf.number].drawn for leaf in given if isinstance(leaf, TensorRef)
        )
        for position, leaf in enumerate(tree_flatten(out)[0]):
            if not isinstance(leaf, torch.Tensor) or _key(leaf) is None:
                continue
            if self.number_of(leaf) is None and not _shares(leaf, call.tensors):
                number = self.add(leaf)
                self.storages[number].written, self.storages[number].drawn = content, drawn
                made.append((position, number))
        for number in call.writes:
            self.storages[number].written = True
            self.storages[number].drawn |= drawn
        if made or call.writes or call.random:
            self.entries.append(
                Entry(
                    call.func,
                    tuple(call.leaves),
                    call.spec,
                    tuple(made),
                    call.writes,
                    call.random,
                    not content,
                )
            )

    def finish(self) -> dict[StorageKey, int]:
        """End the notes; return the numbers of the storages that stand for parameters."""
        alive = {
            key: number
            for key, number in self._numbers.items()
            if self.storages[number].deferred and not is_gone(key)
        }
        keep = needed_entries(self.entries, set(alive.values()), with_random=True)
        self.entries = [e for e, needed in zip(self.entries, keep, strict=True) if needed]
        self._numbers, self._generators = {}, {}
        return alive


@dataclass
class Call:
    """An operation about to be noted: taken apart before it runs, since it may write."""

    func: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    tensors: list[torch.Tensor]
    writes: tuple[int, ...]
    random: bool


def take_apart(log: InitLog, func: Any, args: Any, kwargs: Any, random: bool) -> Call:
    """Return an operation with its tensors as they are now.

    Of a function without a schema, all tensors count as written.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    noted = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            noted.append(log.reference(leaf))
        elif isinstance(leaf, torch.Generator):
            noted.append(log.generator(leaf))
        else:
            noted.append(leaf)
    written = _written(func, args, kwargs)
    numbers = [log.number_of(tensor) for tensor in (tensors if written is None else written)]
    writes = tuple(dict.fromkeys(number for number in numbers if number is not None))
    return Call(func, noted, spec, tensors, writes, random)


def reference_to(tensor: torch.Tensor, number: int) -> TensorRef:
    """Describe a tensor as a range of a numbered storage."""
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    return TensorRef(number, shape, stride, int(tensor.storage_offset()), tensor.dtype)


def key_of(tensor: torch.Tensor) -> StorageKey:
    """What identifies a tensor's storage, also after that is gone."""
    return StorageKey(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def is_gone(key: StorageKey) -> bool:
    """Whether nobody holds a storage any more."""
    return bool(key.expired())  # type: ignore[no-untyped-call]


def needed_entries(entries: Sequence[Entry], wanted: set[int], with_random: bool) -> list[bool]:
    """Tell for each entry whether the content of the wanted storages depends on it.

    Args:
        with_random: keep every random draw, so that the others draw what they drew.
    """
    needed = set(wanted)
    keep = []
    for entry in reversed(entries):
        touched = {*entry.writes, *(number for _, number in entry.made)}
        chosen = not needed.isdisjoint(touched) or (with_random and entry.random)
        if chosen:
            needed |= entry.reads
        keep.append(chosen)
    return keep[::-1]


def is_blank(func: Any) -> bool:
    """Whether an operation makes tensors without content."""
    return _name(func) in _BLANK


def takes_only_form(func: Any) -> bool:
    """Whether an operation takes the form of its argument only, not its content."""
    return _name(func) in _LIKE


def _name(func: Any) -> str:
    return getattr(getattr(func, "overloadpacket", None), "__name__", "")


_HERE = threading.local()


def current_log() -> InitLog | None:
    """The notes that this thread is taking."""
    log: InitLog | None = getattr(_HERE, "log", None)
    return log


@contextmanager
def taking(log: InitLog) -> Iterator[None]:
    """Make ``log`` this thread's notes, with other random numbers than the parameters get.

    What is drawn for real meanwhile (for a buffer, say) must not repeat what the parameters will
    be given when the notes are run from the state that they began with.
    """
    digest = hashlib.sha256(log.state.numpy().tobytes()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
    _HERE.log = log
    try:
        yield
    finally:
        _HERE.log = None


@contextmanager
def suspended(log: InitLog) -> Iterator[None]:
    """Take no notes for a while."""
    before, log.suspended = log.suspended, True
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        log.suspended = before


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
    """Tensors that an operator writes to; None if it has no schema that would tell."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    found = []
    for index, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None or not info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, torch.Tensor)]
    return found


def _key(tensor: torch.Tensor) -> StorageKey | None:
    """What identifies a tensor's storage; None if it has none, like a sparse tensor."""
    try:
        return key_of(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def _shares(tensor: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    return any(_key(tensor) == _key(other) for other in others)


def is_plain(param: torch.Tensor) -> bool:
    """Whether a parameter is an ordinary dense tensor."""
    return type(param) is nn.Parameter and param.layout is torch.strided
