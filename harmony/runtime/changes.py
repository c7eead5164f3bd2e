"""Notices which parameters may have other values than when somebody looked at them last.

No one sign is enough. In-place operations count up a tensor's version. Fused optimizers do not,
nor does what is written through ``param.data``, through other memory that was given to the
parameter, or by somebody who holds the memory itself (a NumPy array).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harmony.capture.graph.params import version_of
from harmony.runtime.data_watch import DataWatch
from harmony.runtime.host.memory_holders import shares_memory


class StepListener(Protocol):
    """Hears of every optimizer's step."""

    def note_stepped(self, params: Iterable[torch.Tensor]) -> None:
        """These parameters have just been changed, or may have been."""


_listeners: weakref.WeakSet[StepListener] = weakref.WeakSet()
_hooks: list[Any] = []


def hear_steps(listener: StepListener) -> None:
    """Let something hear of optimizers' steps, fused ones too, for as long as it lives."""
    _listeners.add(listener)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))


class Changes:
    """The changes of some parameters, for as long as this object lives."""

    def __init__(self, params: Mapping[str, torch.Tensor]) -> None:
        """Take all of these for changed."""
        self.params = dict(params)
        self._data = DataWatch(p for p in params.values() if isinstance(p, nn.Parameter))
        self._seen: dict[str, tuple[int, int]] = {}
        self._stepped: set[int] = set()
        hear_steps(self)

    def of(self, params: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are the parameters."""
        mine = self.params
        return params.keys() == mine.keys() and all(params[n] is mine[n] for n in mine)

    def take(self, name: str, num_moves: int) -> bool:
        """Whether a parameter may have changed since this was asked last.

        Args:
            num_moves: how often it was found in other memory until now.
        """
        param = self.params[name]
        version = version_of(param)
        now = version, num_moves
        # All of them are asked: what was seen now is not seen again.
        signs = (
            self._seen.get(name) != now or version < 0,
            id(param) in self._stepped,
            self._data.may_have_changed(param),
            shares_memory(param),
        )
        self._seen[name] = now
        self._stepped.discard(id(param))
        return any(signs)

    def note_stepped(self, params: Iterable[torch.Tensor]) -> None:
        """Take these for changed."""
        self._stepped.update(map(id, params))


class StepCount:
    """Tells the backwards of one step from those of the next, in a loop of the user's own.

    A step is an optimizer's: backwards whose gradients add up are of one. The next one begins
    where an optimizer has stepped, or where the gradient is gone or the parameter is another.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._param: torch.Tensor | None = None
        self._version = 0
        self._stepped = False

    def of_backward(self, param: torch.Tensor | None, first: int) -> int:
        """Number of the step of a backward, whose gradients have not been added up yet.

        Args:
            param: one that gets a gradient, always the same; None if there is none.
            first: the number of the first step.
        """
        if self._step is None:
            hear_steps(self)
        version = 0 if param is None else version_of(param)
        same = param is not None and param is self._param and version == self._version
        if self._step is None:
            self._step = first
        elif not same or self._stepped or param is None or param.grad is None:
            self._step += 1
        self._param, self._version, self._stepped = param, version, False
        return self._step

    def note_stepped(self, params: Iterable[torch.Tensor]) -> None:
        """Begin another step, if these are of the model."""
        self._stepped = self._stepped or any(param is self._param for param in params)


def note_changes(params: Iterable[torch.Tensor]) -> None:
    """Note that an optimizer has just changed these parameters, or may have."""
    if not _listeners:
        return
    stepped = list(params)
    for listener in list(_listeners):
        listener.note_stepped(stepped)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    note_changes(param for group in optimizer.param_groups for param in group["params"])
