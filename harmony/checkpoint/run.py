"""`Run`: a training run that is saved now and then, ends when it is asked to, and goes on."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from harmony.checkpoint.companions import is_companion
from harmony.checkpoint.random_states import RandomStates
from harmony.checkpoint.saving import Saving
from harmony.checkpoint.store import found_in, step_of
from harmony.checkpoint.training import Restored
from harmony.checkpoint.writing import check_writable
from harmony.core.files import DAMAGED, check_types
from harmony.core.options import Every, current_options
from harmony.core.warn import warn
from harmony.errors import ConfigError, HarmonyError, NotSavedError, text_of
from harmony.report import session
from harmony.report.session import Keeping, ModelRecord
from harmony.runtime.interrupts import Ending

T = TypeVar("T")

_MARK = "harmony.Run"


class Trained(Protocol):
    """What a run needs of a `harmony.Harmony` model."""

    @property
    def num_steps(self) -> int:
        """Steps trained so far."""

    @property
    def record(self) -> ModelRecord:
        """What the report is made of."""

    def save_checkpoint(
        self,
        folder: str | Path,
        *,
        keep: int | None = None,
        extra: Any = None,
        async_save: bool = False,
        **objects: Any,
    ) -> Path:
        """Write a checkpoint."""

    def largest_of(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number in any process that trains the model."""

    @property
    def saving(self) -> Saving | None:
        """The checkpoint that is written while training goes on."""

    def load_checkpoint(
        self, folder: str | Path, *, skip_damaged: bool = False, **objects: Any
    ) -> Restored:
        """Bring the model back to a checkpoint."""


class Run:
    """Saves a run now and then and when it is asked to end, and goes on from where it was saved.

    A few lines of a training script, in either form of training::

        with harmony.Run(model, "runs/a", every="15m", keep=3, scheduler=scheduler) as run:
            run.resume()
            for epoch in run.epochs(10):
                generator.manual_seed(epoch)  # of the DataLoader, which shuffles by it
                for inputs, targets in run.batches(loader):
                    model.train_step(inputs, targets)
                    scheduler.step()
                    run.step()

    A script that knows its batches by number needs less:
    ``for step in range(run.resume(), 1000)``.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP let the step end: `step` then saves, and ends the process
    with exit code 128 + signal, as ``sys.exit`` does. A second signal does what it does without a
    run. What is resumed is, bit for bit, the run that was not interrupted, if all that it depends
    on is in the checkpoint: name every object that has a state, and keep numbers of your own (best
    losses, averages) in `extra`.

    Args:
        model: the `harmony.Harmony` model; one a run.
        folder: where checkpoints are; None saves none. ``harmony-run --checkpoint-dir DIR`` and
            its other options come before ``folder``, ``every``, ``keep``, ``resume`` and
            ``async_save``.
        every: steps between two checkpoints (``100``), or time (``"15m"``); by default
            30 minutes.
        keep: how many checkpoints are kept; None keeps all.
        resume: what `resume` does: ``"auto"`` goes on from the newest checkpoint that is whole,
            and starts anew where there is none; a folder: from the newest in it, or from itself;
            None starts anew.
        save_on_error: whether a ``with`` block that an error leaves saves the state behind the
            last `step`, if the error has left it whole.
        async_save: whether training goes on while a checkpoint is written that is due (see
            `Harmony.save_checkpoint`); the last one, of `close` or a signal, is waited for.
        objects: what else has ``state_dict()`` and ``load_state_dict()``, as for
            `Harmony.save_checkpoint`: optimizers of a loop of your own, schedulers, data loaders
            that know their position.

    Attributes:
        num_steps: calls of `step` so far, those before the last interruption included.
        extra: numbers, texts, tensors, and lists and dictionaries of these, saved with each
            checkpoint; `resume` brings them back.

    Raises:
        ConfigError: for an option that makes no sense, or a folder that cannot be written to.
    """

    def __init__(
        self,
        model: Trained,
        folder: str | Path | None = None,
        *,
        every: int | str | None = None,
        keep: int | None = None,
        resume: str | Path | None = "auto",
        save_on_error: bool = False,
        async_save: bool = False,
        **objects: Any,
    ) -> None:
        options = current_options()
        outside = options.checkpoint_dir is not None or options.resume is not None
        self._folder = options.checkpoint_dir or _path(folder)
        self._every = options.checkpoint_every or Every.of(every)
        self._keep = options.keep if options.keep is not None else keep
        self._from = options.resume if outside else resume
        if self._folder is None and options.resume == "auto":
            raise ConfigError("--resume auto: from which folder? Add --checkpoint-dir DIR")
        asked = every is not None or keep is not None or save_on_error or async_save
        if self._folder is None and asked:
            warn(
                "this harmony.Run has no folder, so nothing is saved: give it one, or start the "
                "script by harmony-run --checkpoint-dir DIR"
            )
        self._objects = objects
        self._model = model
        if outside and session.keepings():
            raise ConfigError(
                "--checkpoint-dir and --resume are for a script with one harmony.Run. With "
                "several give each a folder of its own, and leave these options out"
            )
        self.num_steps = 0
        self.extra: dict[str, Any] = {}
        self._epoch = self._batches = self._skip = 0
        self._in_epochs = self._in_batches = False
        self._random: RandomStates | None = None
        self._boundary: _Boundary | None = None
        self._save_on_error = save_on_error
        self._async = options.async_save or async_save
        self._pending: Saving | None = None
        self._before = 0
        self._resumed = False
        self._saved: tuple[int, int, int] | None = None
        self._saved_s = time.monotonic()
        self._keeping = session.keep(Keeping(self._folder))
        self._ending = Ending()
        if self._folder is not None:
            check_writable(self._folder)
            self._ending.listen()

    # Going on

    def resume(self) -> int:
        """Go on from a checkpoint, if there is one and it is asked for.

        Returns:
            The steps that were counted until then, which is the number of the next; 0 if the run
            starts anew.

        Raises:
            ConfigError: if what was asked for is not there, is damaged, or is of something else;
                or if the folder holds checkpoints of a later step or of another run, which would
                be mixed with those of this one.
        """
        if self.num_steps:
            raise ConfigError(f"resume() after {self.num_steps} steps: call it before the first")
        self._resumed = self._model.record.resumed = True
        source = self._source()
        if source is None:
            return 0
        auto = self._from == "auto"
        restored = self._model.load_checkpoint(source, skip_damaged=auto, **self._objects)
        self._take_up(restored)
        self._random = RandomStates.now()
        self._saved = self.num_steps, self._epoch, self._skip
        self._keeping.num_steps = self._keeping.saved_steps = self.num_steps
        session.say(f"resumed at step {self.num_steps} from {restored.folder}")
        return self.num_steps

    def _source(self) -> Path | None:
        """The folder to go on from; None to start anew.

        Raises:
            ConfigError: if checkpoints in the folder of the run would be mixed with it.
        """
        held = [] if self._folder is None or not self._folder.exists() else found_in(self._folder)
        if self._from is None:
            if held:
                raise ConfigError(
                    f"{self._folder} holds checkpoints already, {held[0].name} for instance. To "
                    "go on from the newest say so (harmony-run --resume auto, resume='auto'); for "
                    "a new run name another folder"
                )
            return None
        if self._from == "auto":
            return self._folder if held else None
        source = Path(self._from)
        newest = found_in(source)[:1]
        if not newest:
            raise ConfigError(f"there are no checkpoints in {source}: no folder step-N")
        chosen = newest[0].resolve()
        others = [
            p for p in held if p.resolve().parent != chosen.parent or step_of(p) > step_of(chosen)
        ]
        if others:
            raise ConfigError(
                f"{self._folder} holds {others[0].name}, which does not lead to {newest[0]}: it "
                "would be taken for one of this run. Remove it, or save to another folder"
            )
        return source

    def _take_up(self, restored: Restored) -> None:
        """Set the counters of a checkpoint; one that no run has written has only its step."""
        kept = restored.extra.get(_MARK) if isinstance(restored.extra, Mapping) else None
        if kept is None:
            self.num_steps = restored.step
            return
        try:
            numbers = kept["step"], kept["epoch"], kept["batches"]
            check_types(numbers, tuple[int, int, int])
            check_types(kept["extra"], dict[Any, Any])
        except DAMAGED as error:
            raise ConfigError(f"{restored.folder}: it is of no run ({error!r})") from None
        self.num_steps, self._epoch, self._skip = numbers
        self.extra = kept["extra"]

    # Through the data

    def epochs(self, number: int) -> Iterator[int]:
        """Yield the numbers of the epochs up to ``number``, from the one that was interrupted."""
        self._in_epochs = True
        while self._epoch < number:
            self._in_batches = False
            yield self._epoch
            self._epoch += 1
            self._batches = self._skip = 0
        self._in_epochs = False

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield what a loader does; in the epoch that was interrupted, from where it was.

        What was trained is drawn again and passed over, and random states put back afterwards. So
        the loader has to give the same batches in the same order: let it shuffle by a generator of
        its own that is seeded by the epoch. A loader that is one of the run's objects knows its
        position, and nothing is passed over.

        Raises:
            ConfigError: if the loader has fewer batches than were trained, or for a second pass
                in one epoch: which one was interrupted is known by `epochs`.
        """
        if self._in_batches:
            raise ConfigError(
                "run.batches() for a second time in one epoch: which pass was interrupted is only "
                "known by run.epochs. Write: for epoch in run.epochs(10)"
            )
        self._in_batches = True
        skip, self._skip = self._skip, 0
        self._batches = skip
        if any(loader is held for held in self._objects.values()):
            skip = 0
        batches = iter(loader)
        for number in range(skip):
            if next(batches, self) is self:
                raise ConfigError(
                    f"the run was saved {skip} batches into epoch {self._epoch}, and the loader "
                    f"has {number}: it is another one"
                )
        if skip and self._random is not None:
            self._random.restore()
        for batch in batches:
            self._batches += 1
            yield batch

    def step(self) -> None:
        """Count a step that is over: save if it is time to, or end if the process is asked to.

        Call it once a step, after the optimizer's and the scheduler's. A checkpoint that the disk
        does not take is a warning, and training goes on until the next is due: only the last, of
        `close` or a signal, has to be written.

        Raises:
            ConfigError: before `resume`, if the command line or the folder asks for that.
            ConfigError: in an epoch of `epochs` whose position nothing knows: neither `batches`
                nor an object of the run that can be iterated.
            NotSavedError: if a signal ends the run, and its state cannot be written.
            SystemExit: after SIGTERM, SIGINT or SIGHUP, with code 128 + signal, once all is saved.
        """
        if not self._resumed:
            self._check_new()
        if self._in_epochs and not self._in_batches:
            self._check_loader()
        self.num_steps += 1
        self._keeping.num_steps = self.num_steps
        # Of several processes one may have been asked to end, or find first that it is time.
        came, due = self._model.largest_of([self._ending.came or 0, self._is_due()])
        if came:
            self._end(signal.Signals(came).name, 128 + came)
        if due and self._is_saved():
            return
        if self._save_on_error:
            self._boundary = _Boundary(self)

    def save(self) -> Path | None:
        """Save now, whether it is time to or not; call it where `step` could be called.

        Returns:
            The folder of the checkpoint; None if the run saves none.
        """
        return self._save(False)

    def close(self) -> None:
        """Save what is not saved yet, and leave signals to others again.

        Raises:
            NotSavedError: if it cannot be written.
        """
        self._ending.close()
        self._settle()
        if self._folder is not None and self.num_steps and self._saved != self._position():
            self.save()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        self._ending.close()
        if self._save_on_error and self._folder is not None and not isinstance(error, SystemExit):
            self._rescue(error)

    # Saving

    def _position(self) -> tuple[int, int, int]:
        return self.num_steps, self._epoch, self._batches

    def _is_due(self) -> bool:
        if self._folder is None:
            return False
        if self._every.steps is not None:
            return self.num_steps % self._every.steps == 0
        return time.monotonic() - self._saved_s >= (self._every.seconds or 0)

    def _save(self, meanwhile: bool) -> Path | None:
        if self._folder is None:
            return None
        saved = self._write(self._objects, self._position(), self.extra, meanwhile)
        self._boundary = None
        return saved

    def _is_saved(self) -> bool:
        """Save, if the disk takes it; else say so: another is written when it is due."""
        try:
            self._save(self._async)
        except NotSavedError as error:
            self._saved_s = time.monotonic()
            warn(f"{error}. Training goes on, and another is written when it is due")
            return False
        return True

    def _write(
        self,
        objects: Mapping[str, Any],
        position: tuple[int, int, int],
        extra: Any,
        meanwhile: bool = False,
    ) -> Path:
        assert self._folder is not None
        self._settle()
        step, epoch, batches = position
        kept = {"step": step, "epoch": epoch, "batches": batches, "extra": extra}
        folder = self._model.save_checkpoint(
            self._folder, keep=self._keep, extra={_MARK: kept}, async_save=meanwhile, **objects
        )
        self._saved, self._saved_s = position, time.monotonic()
        self._pending = self._model.saving if meanwhile else None
        self._before = self._keeping.saved_steps
        self._keeping.saved_steps = step
        return folder

    def _settle(self) -> None:
        """Wait for the checkpoint that is written, and see whether it is one."""
        if self._pending is None:
            return
        self._pending.wait()
        if self._pending.error is not None:
            self._pending.tell()
            self._saved, self._keeping.saved_steps = None, self._before
        self._pending = None

    def _end(self, why: str, code: int) -> NoReturn:
        """End the process where everything is of one step."""
        saved = self.save()
        self._ending.close()
        session.say(f"{why}: the run ends after {self.num_steps} steps, saved in {saved}")
        raise SystemExit(code)

    def _rescue(self, error: BaseException) -> None:
        """Save what the last step has left, if the error has changed nothing of it."""
        self._settle()
        if self._keeping.saved_steps == self.num_steps:
            return
        boundary, name = self._boundary, type(error).__name__
        if boundary is None or boundary.model_steps != self._model.num_steps:
            session.say(
                f"{name} in the middle of step {self.num_steps}: its state is not that of a step, "
                "and is not saved"
            )
            return
        try:
            with boundary.random.put_back():
                saved = self._write(boundary.objects, boundary.position, boundary.extra)
        except HarmonyError as failure:
            session.say(f"{name}: the state cannot be saved: {text_of(failure)}")
            return
        session.say(f"{name} after {self.num_steps} steps: their state is saved in {saved}")

    def _check_loader(self) -> None:
        """Hear that an epoch goes through batches that `batches` does not see."""
        if not any(hasattr(type(held), "__iter__") for held in self._objects.values()):
            raise ConfigError(
                "a step in an epoch of run.epochs, but not in run.batches(loader): where in the "
                "epoch it is would not be saved. Write: for batch in run.batches(loader), or give "
                "the run a loader that knows its position (harmony.Run(model, data=loader))"
            )

    def _check_new(self) -> None:
        """Hear that the run goes on without `resume`."""
        self._resumed = True
        if self._folder is not None and self._folder.exists() and found_in(self._folder):
            raise ConfigError(
                f"{self._folder} holds checkpoints already, and the script has not called "
                "run.resume(): call it before the first step, or name another folder"
            )


class _Boundary:
    """What a run was like when its last step was over, but for the model and its optimizers."""

    def __init__(self, run: Run) -> None:
        self.model_steps = run._model.num_steps
        self.position = run._position()
        self.random = RandomStates.now()
        self.extra = copy.deepcopy(run.extra)
        # Optimizers change with the model, of which nothing is copied: they are as they were.
        self.objects = {
            name: held if _stays(held) else _Held(held.state_dict())
            for name, held in run._objects.items()
        }


def _stays(held: Any) -> bool:
    """Whether it is as it was, or has no state."""
    return isinstance(held, torch.optim.Optimizer) or is_companion(held)


class _Held:
    """Stands for an object as it was."""

    def __init__(self, state: Any) -> None:
        self._state = copy.deepcopy(state)

    def state_dict(self) -> Any:
        """The state that it had."""
        return self._state


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)
