"""Whether a model can go on: all of its state is of one step, and its threads are there.

Parameters, buffers, optimizer state and the number of steps change together. What ends a step
before it is over leaves either all of them as they were, or a model that says that it is torn and
refuses to go on until a state is loaded.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from harmony.core.warn import warn
from harmony.engine.bypass import within
from harmony.engine.turns import in_turn
from harmony.errors import DeviceLostError, HarmonyError, text_of
from harmony.runtime import native
from harmony.runtime.exec.out_of_memory import out_of_memory
from harmony.runtime.interrupts import held_back
from harmony.runtime.traced_lock import TracedLock
from harmony.runtime.update.optimizer import PackOptimizer

P = ParamSpec("P")
R = TypeVar("R")


class _Exclusive(Protocol):
    """What `alone` needs of an object whose methods take turns."""

    whole: Wholeness
    lock: TracedLock
    devices: list[torch.device]


E = TypeVar("E", bound=_Exclusive)


def alone(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Let one thread at a time run a model, which has one place for its gradients and values.

    And one model at a time in a process (`in_turn`).

    The same thread may come in again: `torch.utils.checkpoint` runs a forward in a backward.
    Signals are heard when it is over, or where a step has not yet changed anything.
    """

    @functools.wraps(method)
    def run(self: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.whole.check_process()  # before any lock, which a thread may hold that is not here
        naming = self.whole.naming(method.__name__, self.devices)
        with in_turn(), held_back(), self.lock, within(self.whole.net), naming, _uncompiled():
            return method(self, *args, **kwargs)

    return run


def _uncompiled() -> AbstractContextManager[None]:
    """Have what `torch.compile` has made run as it was written, until the block ends.

    A recording takes it apart, copies of it would be compiled once for each device and length,
    and virtual GPUs are no device of its code generators.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class Wholeness:
    """Of one model.

    Attributes:
        net: the module.
        begun: what the step that runs has begun to change; empty while all is of the step before.
        closed: whether the model has been closed.
    """

    def __init__(self, net: nn.Module, optimizer: PackOptimizer | None) -> None:
        self.begun: list[str] = []
        self.closed = False
        self.net = net
        self._optimizer = optimizer
        self._process = os.getpid()
        self._torn: str | None = None
        self._lost: DeviceLostError | None = None
        self._awaited: list[Any] = []

    @contextmanager
    def together(self) -> Iterator[list[str]]:
        """Make the block one change of the model: if it does not come to its end, it is torn.

        Yields:
            A list that hears of the first change before it is made: what fails until then has
            changed nothing.
        """
        self.begun.clear()
        try:
            yield self.begun
        except BaseException as error:
            if self.begun:
                self.tear(error)
            raise

    def check(self) -> None:
        """Refuse to go on with what cannot.

        Raises:
            HarmonyError: naming the reason and the remedy.
        """
        self.check_process()
        if self.closed:
            raise HarmonyError(
                "this Harmony model has been closed: its threads and GPU memory are given back. "
                "The module it wrapped (model.module) has all values; wrap it anew"
            )
        if self._lost is not None:
            raise DeviceLostError(text_of(self._lost), self._lost.task, torn=self._lost.torn)
        if self._torn is not None:
            raise HarmonyError(
                "an earlier step failed after some parameters had been updated; load a checkpoint "
                f"with load_state_dict() before training goes on. The failure: {self._torn}"
            )
        if self._awaited:
            self._check_optimizer()

    def check_process(self) -> None:
        """Refuse to run in a child of the process that made the model.

        Raises:
            HarmonyError: since threads, streams and GPU memory stay with the parent.
        """
        if os.getpid() != self._process:
            raise HarmonyError(
                f"this Harmony model was made in process {self._process}, and process "
                f"{os.getpid()} was forked from it: threads and GPU memory stay with the parent. "
                "Run it there, or make the model in the child, started with the 'spawn' method "
                "(multiprocessing.get_context('spawn'))"
            )

    def restored(self, missing: Collection[str] = ()) -> bool:
        """Note that a state was loaded, without the tensors named ``missing``.

        Returns:
            Whether the model was torn until now.
        """
        if self._torn is None:
            return False
        loaded: dict[int, bool] = {}
        names: dict[int, str] = {}
        for name, param in self.net.named_parameters(remove_duplicate=False):
            if param.requires_grad:
                names.setdefault(id(param), name)
                loaded[id(param)] = loaded.get(id(param), False) or name not in missing
        left = [name for key, name in names.items() if not loaded[key]]
        if left:
            self._torn += (
                f" (A state was loaded since, but without {left[0]} and other trained parameters, "
                f"{len(left)} in all)"
            )
            return False
        self._torn = None
        return True

    def is_as_before(self) -> None:
        """Note that all that a step has changed was put back."""
        self._torn = None
        for hook in self._awaited:
            hook.remove()
        self._awaited.clear()

    @contextmanager
    def naming(self, where: str, devices: Sequence[torch.device]) -> Iterator[None]:
        """Let what a GPU's runtime raises in the block, outside of any task, name ``where``."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise out_of_memory(where, devices, error) from error
        except torch.AcceleratorError as error:
            torn = self._torn is not None
            after = "No parameter was changed"
            if torn:
                after = (
                    "Some parameters may be of the step after already, the others are of the step "
                    "before: go back to a checkpoint"
                )
            found = native.call_failed(where, error, devices, after, torn=torn)
            if torn:
                self.tear(found)
            raise found from error

    def tear(self, error: BaseException) -> None:
        """Refuse to go on from now, as what failed has changed some of the state."""
        if isinstance(error, DeviceLostError):
            # Not the error itself: the frames of its cause hold memory of the GPU.
            self._lost = DeviceLostError(text_of(error), error.task, torn=error.torn)
        self._torn = text_of(error) or type(error).__name__
        if self._optimizer is None or self._awaited:
            return
        optimizer, awaited = self._optimizer.full, self._awaited
        if any(optimizer.state.values()):
            hook = optimizer.register_load_state_dict_post_hook(lambda _: awaited.clear())
            awaited.append(hook)

    def _check_optimizer(self) -> None:
        """Say that the optimizer's state, too, is partly of the step that failed."""
        self.is_as_before()
        warn(
            "the model's state was loaded after a step that failed halfway, but the optimizer's "
            "was not: some of it is of the failed step. Load it as well: "
            "model.optimizer.load_state_dict(...)",
        )
