"""What a forward has written, and what it has only set up: a table of shapes and constants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from harmony.capture.guards.holders import MISSING, Entry, Holder, Names, Whole
from harmony.capture.guards.reachable import Walk
from harmony.capture.state.python_state import is_plain

Judges = Callable[[torch.Tensor], bool]


class SetUp:
    """What a forward sets up for later ones; whoever runs its recording leaves it for them.

    The next forward may go by what it finds, so it is recorded with that.

    Attributes:
        names: of the places, as guards name them.
    """

    def __init__(self, found: Iterable[tuple[str, Callable[[Any], None], Any]] = ()) -> None:
        """Take names of places, what puts a value there, and the value: a tensor, or several."""
        self._found = list(found)
        self.names = frozenset(name for name, _, _ in self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def leave(self) -> None:
        """Put copies of all values in their places, on the host."""
        copies: dict[int, torch.Tensor] = {}
        for _, put, value in self._found:
            put(_copied(value, copies))


def _copied(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_copied(inner, copies) for inner in value)
    if id(value) not in copies:
        copies[id(value)] = value.detach().to("cpu", copy=True)
    return copies[id(value)]


def set_up_by(judge: Judge, around: Collection[Holder], copied: Walk) -> SetUp:
    """Return what a forward on a copy of a module has set up there, and outside of the module.

    Args:
        around: what the user's objects hold, the module's among them.
        copied: the same of the copy.
    """
    found = [pair for holder in around for pair in _tables(judge, holder, holder)]
    by_hooks = _made_by_torchs_hooks(copied)
    changed = [h for h in copied.holders if not h.same() and id(h) not in by_hooks]
    for holder in changed:
        alike = [other for other in around if other.name == holder.name]
        same = [other for other in copied.holders if other.name == holder.name]
        if len(alike) == len(same):
            found += _tables(judge, holder, alike[same.index(holder)])
    return SetUp(found)


def _tables(
    judge: Judge, holder: Holder, place: Holder
) -> Iterator[tuple[str, Callable[[Any], None], Any]]:
    """Yield the tables that a holder has got, each with the name of another place for it."""
    if holder.same() or type(holder) is not type(place):
        return
    if isinstance(holder, Entry) and isinstance(place, Entry):
        value = holder.found()
        if isinstance(value, (torch.Tensor, tuple)) and judge.is_table(value):
            yield place.name, place.put, value
    if isinstance(holder, (Names, Whole)) and isinstance(place, (Names, Whole)):
        for key, value in holder.new_items():
            if judge.is_table(value):
                yield place.name, place.putter(key), value


class Judge:
    """Tells what a forward has written from what it has only set up, such as a table.

    A tensor that depends on shapes and constants alone comes out the same whoever makes it.
    """

    def __init__(self, made_of_data: Judges) -> None:
        self._made_of_data = made_of_data

    def written(self, holders: Collection[Holder]) -> str | None:
        """Name the first thing that was written to."""
        found = (h.name for h in holders if not h.same() and self._is_written(h))
        return next(found, None)

    def written_by_copy(self, walk: Walk) -> str | None:
        """Name the first thing of a copied module that was written to and is not recorded.

        Plain attributes of modules, and containers of plain values there, are.
        """
        direct = {id(entry): entry for entry, *_ in walk.attributes}
        made_by_hooks = _made_by_torchs_hooks(walk)
        containers = {id(entry.expected) for entry in direct.values()}

        def is_recorded(holder: Holder) -> bool:
            if isinstance(holder, Whole) and id(holder.container) in containers:
                return is_plain(holder.container) and is_plain(holder.held)
            if isinstance(holder, Names) and holder.owner is nn.Module:
                return all(map(self._is_set_up, holder.added()))
            return id(holder) in direct and _both_plain(direct[id(holder)])

        changed = (holder for holder in walk.holders if not holder.same())
        found = (h for h in changed if id(h) not in made_by_hooks and not is_recorded(h))
        return next((h.name for h in found if self._is_written(h)), None)

    def _is_written(self, holder: Holder) -> bool:
        if isinstance(holder, Entry):
            before = holder.expected
            fresh = before is None or before is MISSING or isinstance(before, torch.Tensor)
            return not (fresh and self.is_table(holder.found()))
        if isinstance(holder, Names):
            return not all(map(self.is_table, holder.added()))
        if isinstance(holder, Whole) and isinstance(holder.container, dict):
            known = {id(value) for value in holder.held}
            new = [value for value in holder.container.values() if id(value) not in known]
            kept = holder.held[::2]
            return not (
                all(key in holder.container for key in kept) and all(map(self.is_table, new))
            )
        return True

    def is_table(self, value: Any) -> bool:
        """Whether a value is a tensor, or several, that comes out the same whoever makes it."""
        if isinstance(value, tuple):
            return all(map(self.is_table, value))
        return isinstance(value, torch.Tensor) and not self._made_of_data(value)

    def _is_set_up(self, value: Any) -> bool:
        return is_plain(value) or self.is_table(value)


def _made_by_torchs_hooks(walk: Walk) -> set[int]:
    """Holders of attributes that hooks of PyTorch compute before each forward (weight norm)."""
    return {
        id(entry)
        for entry, module, name in walk.owners()
        for hook in module._forward_pre_hooks.values()
        if type(hook).__module__.startswith("torch.") and getattr(hook, "name", None) == name
    }


def _both_plain(entry: Entry) -> bool:
    now = entry.found()
    return (
        is_plain(now)
        if entry.expected is MISSING
        else is_plain(entry.expected) and (now is MISSING or is_plain(now))
    )
