"""A checkpoint on its way to the disk: at once, or by a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harmony.checkpoint.store import keep_last
from harmony.checkpoint.writing import TensorFiles, writing
from harmony.core.warn import warn
from harmony.errors import NotSavedError, text_of
from harmony.report import session
from harmony.runtime.interrupts import held_back
from harmony.runtime.unsaved import Key, Unsaved

WEIGHTS, STATE, VALUES = "model", "state", "state.json"
_LOOK_UP_S = 0.1


@dataclass(frozen=True)
class Snapshot:
    """What a run consists of between two steps.

    Attributes:
        step: steps trained.
        values: what is no tensor, as JSON.
        beside: files that Hugging Face's library reads, by name.
        tensors: those that something may change of which nobody hears; few bytes, mostly.
        unsaved: parameters and their optimizer state.
        fetch: returns the values of a tensor, which another process may keep.
    """

    step: int
    values: dict[str, Any]
    beside: dict[str, bytes]
    tensors: dict[Key, torch.Tensor]
    unsaved: Unsaved
    fetch: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    def write(
        self, root: Path, keep: int | None, may_change: Callable[[], None] = lambda: None
    ) -> None:
        """Write it, in the order in which a step will change it: the last layers first.

        Args:
            may_change: called once only the parameters and their state are left to be written.

        Raises:
            ConfigError: if it holds something that cannot be saved.
            NotSavedError: if it cannot be written.
        """
        try:
            with writing(root, self.step) as writer:
                forms: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, STATE: {}}
                groups = [self.tensors, *(unit.tensors for unit in self.unsaved.units)]
                for (stem, name), tensor in (x for group in groups for x in group.items()):
                    forms[stem][name] = tensor
                files = {s: TensorFiles(writer, s, tensors) for s, tensors in forms.items()}
                for (stem, name), tensor in self.tensors.items():
                    files[stem].put(name, self.fetch(tensor))
                writer.json(VALUES, self.values)
                for name, data in self.beside.items():
                    writer.write(name, data)
                del forms, groups
                self.tensors.clear()
                may_change()
                for unit in self.unsaved.units:
                    with self.unsaved.reading(unit) as tensors:
                        for (stem, name), tensor in tensors.items():
                            files[stem].put(name, self.fetch(tensor))
                for file in files.values():
                    file.finish()
            if keep is not None:
                keep_last(root, keep, self.step)
        finally:
            self.unsaved.end()


class Saving:
    """A snapshot that a thread of its own writes.

    The thread outlives the script, so that what it writes is whole.

    Attributes:
        step: steps trained.
        error: why there is no checkpoint, once that is known.
        waited_s: seconds that training has waited for it, once it is over.
        copied_nbytes: the most that copies of parameters and states have taken at one time.
    """

    def __init__(self, snapshot: Snapshot, root: Path, keep: int | None) -> None:
        self.step = snapshot.step
        self.error: NotSavedError | None = None
        self.waited_s, self.copied_nbytes = 0.0, 0
        self._told = False
        self._is_given_up, self._lock = False, threading.Lock()
        self._may_change, self._over = threading.Event(), threading.Event()
        self._work: tuple[Snapshot, Path, int | None] | None = (snapshot, root, keep)

    def start(self) -> None:
        """Begin; returns once nothing can change any more of which nobody hears.

        Raises:
            NotSavedError: if the system has no thread for it.
        """
        work, self._work = self._work, None
        assert work is not None, "it begins once"
        snapshot = work[0]
        snapshot.unsaved.begin()
        thread = threading.Thread(target=self._run, args=work, name="harmony-save")
        try:
            with held_back():  # a signal comes before the thread runs, or once it does
                thread.start()
            _wait(self._may_change)
        except RuntimeError as error:
            snapshot.unsaved.end()
            self.error = NotSavedError(f"the checkpoint of step {self.step} failed: {error}")
            self._over.set()
            raise self.error from None
        except BaseException:  # Ctrl-C: the script may change what is not written yet
            with self._lock:
                self._is_given_up = not self._may_change.is_set()
            raise

    def wait(self) -> None:
        """Wait until it is over."""
        _wait(self._over)

    def _go_on(self) -> None:
        with self._lock:
            if self._is_given_up:
                raise NotSavedError(f"the checkpoint of step {self.step} was interrupted")
            self._may_change.set()

    def tell(self) -> None:
        """Warn, once, if it is over and there is no checkpoint."""
        if self.error is not None and not self._told:
            self._told = True
            warn(f"{self.error}. Training goes on")

    def _run(self, snapshot: Snapshot, root: Path, keep: int | None) -> None:
        try:
            snapshot.write(root, keep, self._go_on)
        except NotSavedError as error:
            self.error = NotSavedError(text_of(error))  # that one's frames hold tensors
        except BaseException as error:
            why = f"{type(error).__name__}: {text_of(error)}"
            self.error = NotSavedError(f"the checkpoint of step {self.step} failed: {why}")
        finally:
            self.waited_s = snapshot.unsaved.waited_s
            self.copied_nbytes = snapshot.unsaved.copied_nbytes
            self._may_change.set()
            self._over.set()
        if self.error is not None and not threading.main_thread().is_alive():
            session.say(text_of(self.error))  # nobody will ask


def _wait(event: threading.Event) -> None:
    """Wait, and hear signals that another thread was given."""
    while not event.wait(_LOOK_UP_S):
        pass
