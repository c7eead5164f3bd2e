"""Notices which parameters may have other values than when somebody looked at them last.

No one sign is enough. In-place operations count up a tensor's version. Fused optimizers do not,
nor does what is written through ``param.data``, through other memory that was given to the
parameter, or by somebody who holds the memory itself (a NumPy array).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harmony.capture.graph.params import version_of
from harmony.runtime.data_watch import DataWatch
from harmony.runtime.host.memory_holders import shares_memory

_listeners: weakref.WeakSet[Changes] = weakref.WeakSet()
_hooks: list[Any] = []


class Changes:
    """The changes of some parameters, for as long as this object lives.

    What is written through memory that somebody got hold of and has let go of since
    (``param.detach().numpy()[0] = 1``) is not seen: nothing tells of it.
    """

    def __init__(self, params: Mapping[str, torch.Tensor]) -> None:
        """Take all of these for changed."""
        self.params = dict(params)
        self._data = DataWatch(p for p in params.values() if isinstance(p, nn.Parameter))
        self._seen: dict[str, tuple[int, int]] = {}
        self._stepped: set[int] = set()
        _listeners.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_after_step))

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


def note_changes(params: Iterable[torch.Tensor]) -> None:
    """Note that an optimizer has just changed these parameters, or may have."""
    if not _listeners:
        return
    stepped = [id(param) for param in params]
    for listener in list(_listeners):
        listener._stepped.update(stepped)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    note_changes(param for group in optimizer.param_groups for param in group["params"])
