"""Runs the notes of a construction again, this time with memory for the parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from harmony.errors import ConfigError
from harmony.weights.init_log import Entry, GeneratorRef, InitLog, TensorRef, needed_entries


@dataclass(frozen=True)
class Target:
    """Where the content of a parameter is wanted.

    Attributes:
        name: of the parameter, for errors.
        source: what stands for it in the notes.
        view: memory to fill, of the same shape.
    """

    name: str
    source: TensorRef
    view: torch.Tensor


def replay(log: InitLog, targets: Sequence[Target], *, complete: bool) -> None:
    """Fill the targets with what the construction that was noted would have computed.

    One storage is in memory at a time beside the targets, unless the construction itself computes
    with several.

    Args:
        complete: the targets are all parameters of the notes. Then every draw is made, in order,
            from the state that the notes began with, as the construction would have made it.
            Else each needed draw gets a state of its own.
    """
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(log.state)
        with torch.no_grad():
            _Replay(log, targets, complete).run()
    finally:
        torch.set_rng_state(before)


class _Replay:
    """One run of the notes."""

    def __init__(self, log: InitLog, targets: Sequence[Target], complete: bool) -> None:
        self._log = log
        self._complete = complete
        self._targets: dict[int, list[Target]] = {}
        for target in targets:
            self._targets.setdefault(target.source.number, []).append(target)
        self._memory: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._needed = needed_entries(log.entries, set(self._targets), complete)
        self._last_use = {
            number: index
            for index, entry in enumerate(log.entries)
            if self._needed[index]
            for number in (*entry.reads, *(number for _, number in entry.made))
        }

    def run(self) -> None:
        for index, entry in enumerate(self._log.entries):
            if not self._needed[index]:
                continue
            if entry.random and not self._complete:
                self._seed_apart(index)
            self._execute(entry)
            for number in {*entry.reads, *(number for _, number in entry.made)}:
                if self._last_use[number] == index:
                    self._deliver(number)
        for number in self._targets.keys() - self._last_use.keys():
            self._deliver(number)

    def _execute(self, entry: Entry) -> None:
        made = [number for _, number in entry.made]
        if entry.blank and all(map(self._place, made)):
            return
        leaves = [self._resolve(leaf) for leaf in entry.leaves]
        args, kwargs = tree_unflatten(leaves, entry.spec)
        results = tree_flatten(entry.func(*args, **kwargs))[0]
        for position, number in entry.made:
            result = results[position]
            self._memory[number] = (result.untyped_storage(), 0)
            if self._place_of(number) is not None:
                self._copy_out(number)
                self._place(number)

    def _resolve(self, leaf: Any) -> Any:
        if isinstance(leaf, TensorRef):
            return self._tensor(leaf)
        if isinstance(leaf, GeneratorRef):
            if leaf.index not in self._generators:
                generator = self._generators[leaf.index] = torch.Generator()
                generator.set_state(self._log.generators[leaf.index])
            return self._generators[leaf.index]
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        # The copy serves once: an operator may write to it.
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    def _tensor(self, ref: TensorRef) -> torch.Tensor:
        if ref.number not in self._memory and not self._place(ref.number):
            if ref.number not in self._targets:
                raise ConfigError(
                    "a parameter was computed from a tensor on the meta device that has no "
                    "values: build the whole model inside one harmony.meta_init()"
                )
            nbytes = self._log.storages[ref.number].nbytes
            storage = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
            self._memory[ref.number] = (storage, 0)
        storage, shift = self._memory[ref.number]
        offset = shift // ref.dtype.itemsize + ref.offset
        return torch.empty(0, dtype=ref.dtype).set_(storage, offset, ref.shape, ref.stride)

    def _place_of(self, number: int) -> Target | None:
        """The target whose memory can be that of a storage, if it has the same layout."""
        targets = self._targets.get(number, ())
        if len(targets) != 1:
            return None
        (target,) = targets
        source, view = target.source, target.view
        same = source.offset == 0 and source.dtype == view.dtype
        same = same and source.stride == tuple(view.stride())
        return target if same and self._log.storages[number].nbytes == view.nbytes else None

    def _place(self, number: int) -> bool:
        """Let a storage lie where its content is wanted."""
        target = self._place_of(number)
        if target is None:
            return False
        view = target.view
        shift = int(view.storage_offset()) * view.element_size()
        self._memory[number] = (view.untyped_storage(), shift)
        return True

    def _deliver(self, number: int) -> None:
        """A storage has its final content: hand it over and let go of its memory."""
        self._copy_out(number)
        self._memory.pop(number, None)

    def _copy_out(self, number: int) -> None:
        for target in self._targets.get(number, ()):
            value = self._tensor(target.source)
            if value.data_ptr() != target.view.data_ptr():
                target.view.copy_(value)

    def _seed_apart(self, index: int) -> None:
        text = self._log.state.numpy().tobytes() + str(index).encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
        torch.default_generator.manual_seed(seed)
