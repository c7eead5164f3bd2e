"""What a checkpoint has still to read while training goes on, and who must not change it before.

A copy of the model would take as much memory again. So the values stay where they are until they
are read, and who is about to change some says so: what is not read yet is copied then, as far as
there is memory to spare, or else waited for. All of Harmony's updates say so, steps of optimizers,
and whoever asks for ``param.data``. An operation in place on a parameter, ``param.mul_(2)``, can
not be foreseen: its version counter tells of it, and there is no checkpoint then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harmony.capture.graph.params import version_of
from harmony.errors import NotSavedError
from harmony.runtime import data_watch, native
from harmony.runtime.host.memory_holders import shares_memory

Key = tuple[str, str]
"""A file and a name in it."""

_LOOK_AGAIN_S = 0.1

_open: list[Unsaved] = []
_ended = native.new_tokens(1)[0]
_hooks: list[Any] = []


def about_to_change(
    params: Iterable[torch.Tensor], check: Callable[[], None] = lambda: None
) -> None:
    """Say that these parameters or their optimizer state are going to change; it may take a while.

    Args:
        check: called now and then while this waits; may raise.
    """
    native.trace_acquire(_ended)
    if _open:
        found = list(params)
        for unsaved in list(_open):
            unsaved.about_to_change(found, check)


def is_being_saved() -> bool:
    """Whether a checkpoint is written while training goes on: its thread reads parameters."""
    return bool(_open)


class _Is(Enum):
    WAITING = auto()
    BEING_READ = auto()
    COPIED = auto()
    DONE = auto()


class Unit:
    """A parameter with its optimizer state: what one update changes.

    Attributes:
        name: of the parameter.
        tensors: what is to be read.
    """

    def __init__(
        self, name: str, param: nn.Parameter, tensors: Mapping[Key, torch.Tensor]
    ) -> None:
        self.name, self.param = name, param
        self.tensors = dict(tensors)
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._is = _Is.WAITING
        self._versions = self._now()
        self._token = native.new_tokens(1)[0]

    @property
    def is_unread(self) -> bool:
        """Whether its values are still needed where they are."""
        return self._is in (_Is.WAITING, _Is.BEING_READ)

    def _now(self) -> list[int]:
        return [version_of(tensor) for tensor in self.tensors.values()]

    def _check(self) -> None:
        if self._now() != self._versions:
            raise NotSavedError(
                f"{self.name} or its optimizer state was changed in place while it was saved, "
                "by something other than an optimizer. Save before it without async_save, or call "
                "model.finish_saving() before you change it"
            )


class Unsaved:
    """Units in the order in which they are read.

    Attributes:
        units: of the checkpoint.
        waited_s: seconds that others have waited for the reader.
        copied_nbytes: the most that copies have taken at one time.
    """

    def __init__(self, units: Sequence[Unit], spare_nbytes: int) -> None:
        """Note the units as they are now.

        Args:
            spare_nbytes: that copies may take together.
        """
        self.units = units
        self.waited_s, self.copied_nbytes = 0.0, 0
        self._copies_nbytes = 0
        self._of = {id(unit.param): unit for unit in units}
        self._spare_nbytes = spare_nbytes
        self._condition = threading.Condition()
        self._began = native.new_tokens(1)[0]
        self._process = os.getpid()

    def unseen(self) -> str | None:
        """Name of a parameter that somebody could change without a word; None if there is none."""
        return next((unit.name for unit in self.units if shares_memory(unit.param)), None)

    def begin(self) -> None:
        """From now on have what is about to change wait, or copied."""
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))
        native.trace_release(self._began)
        _open.append(self)
        data_watch.listen(self)

    def end(self) -> None:
        """Let everything change again, whether it was read or not."""
        with self._condition:
            for unit in self.units:
                unit._is = _Is.DONE
                unit.tensors.clear()
            native.trace_release(_ended)
            if self in _open:
                _open.remove(self)
            self._condition.notify_all()

    @contextmanager
    def reading(self, unit: Unit) -> Iterator[Mapping[Key, torch.Tensor]]:
        """Keep a unit as it is while the block reads it.

        Raises:
            NotSavedError: if it has changed all the same.
        """
        with self._condition:
            copied = unit._is is _Is.COPIED
            if not copied:
                unit._is = _Is.BEING_READ
        native.trace_acquire(self._began)
        for tensor in () if copied else unit.tensors.values():
            native.trace_host_access(f"the checkpoint of {unit.name}", tensor, write=False)
        yield unit.tensors
        if not copied:
            unit._check()
        with self._condition:
            unit._is = _Is.DONE
            self._copies_nbytes -= unit.nbytes if copied else 0
            unit.tensors.clear()
            native.trace_release(unit._token)
            self._condition.notify_all()

    def about_to_change(self, params: Iterable[torch.Tensor], check: Callable[[], None]) -> None:
        """Copy what is not read yet of these parameters, or wait for it."""
        if os.getpid() != self._process:  # a fork has neither the reader nor its parameters
            return
        units = [unit for param in params if (unit := self._of.get(id(param))) is not None]
        for unit in units:
            with self._condition:
                if unit._is is _Is.WAITING and self._has_room(unit):
                    self._copy(unit)
        for unit in units:
            self._wait(unit, check)

    def _has_room(self, unit: Unit) -> bool:
        return self._copies_nbytes + unit.nbytes <= self._spare_nbytes

    def _copy(self, unit: Unit) -> None:
        for tensor in unit.tensors.values():
            native.trace_host_access(f"the copy of {unit.name}", tensor, write=False)
        copies = {key: tensor.detach().clone() for key, tensor in unit.tensors.items()}
        if unit._now() == unit._versions:  # else the reader will say so
            unit.tensors, unit._is = copies, _Is.COPIED
            self._copies_nbytes += unit.nbytes
            self.copied_nbytes = max(self.copied_nbytes, self._copies_nbytes)

    def _wait(self, unit: Unit, check: Callable[[], None]) -> None:
        started = time.perf_counter()
        with self._condition:
            while unit.is_unread:
                check()
                self._condition.wait(_LOOK_AGAIN_S)
            self.waited_s += time.perf_counter() - started
        if unit._is is _Is.DONE:
            native.trace_acquire(unit._token)

    def note_data(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        """Hear that somebody gets hold of a parameter's memory, or replaces it."""
        if self in _open:
            self.about_to_change([param], lambda: None)

    def note_alias(self, param: torch.Tensor) -> None:
        """Go on: who detaches a parameter mostly reads, and operations in place are seen."""


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _open:
        about_to_change(p for group in optimizer.param_groups for p in group["params"])
