"""What a backward reads again from the host: whether it is as the forward found it.

Plain PyTorch keeps the results of a layer for its backward. Harmony makes them again, from the
weights. Where the weights have other values by then, the gradients would differ: such a backward
is refused. PyTorch's version counters tell of operations in place, and its hooks of optimizers.
Who writes past both (``param.data``, a NumPy array) needs the memory. So the values are compared
of parameters whose memory somebody has while the forward runs, or gets hold of before the
backward; and of buffers, which are small.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harmony.capture.graph.params import version_of
from harmony.core.units import listed
from harmony.errors import HarmonyError
from harmony.runtime.changes import hear_steps
from harmony.runtime.data_watch import fingerprint, listen
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.memory_holders import shares_memory
from harmony.runtime.update.optimizer import check_takes_dense

Version = tuple[int, int]
"""How often a tensor was changed: in place, and by a new value's move into the arena."""


class ReadAgain:
    """The parameters and buffers of one forward, as they were when it ran."""

    def __init__(self, arena: HostArena, written: Container[str]) -> None:
        """Note how they are.

        Args:
            written: buffers that the forward itself changes; they may have other values.
        """
        names = [name for name in arena.tensors if name not in written]
        self._arena = arena  # not the tensors: who else holds one, others go by
        self._versions = {name: self._version(name) for name in names}
        self._stepped: set[int] = set()
        self._values = {
            name: fingerprint(arena.tensors[name]) for name in names if _is_open(arena, name)
        }
        self._names: dict[int, str] | None = None
        listen(self)
        hear_steps(self)  # fused ones are no operations in place: autograd does not see them
        _trained.add(arena)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_check_step))

    def check(self, names: Iterable[str]) -> None:
        """Refuse a backward that would read other values of these than its forward did.

        Raises:
            HarmonyError: naming the tensors that changed.
        """
        names = [name for name in names if name in self._versions]
        changed = [name for name in names if self._has_changed(name)]
        how = "by optimizer.step(), load_state_dict() or an in-place operation"
        if not changed:
            changed = [name for name in names if not self._has_values(name)]
            how = "through its .data, an array, or other memory that is the same"
        if not changed:
            return
        what = (
            "parameter" if isinstance(self._arena.tensors[changed[0]], nn.Parameter) else "buffer"
        )
        raise HarmonyError(
            f"backward() after {what} {listed(changed, 1)} had been changed ({how}) since its "
            "forward: the gradients would belong to neither. Call backward() before the "
            f"{what}s change, or run the forward again"
        )

    def note_stepped(self, params: Iterable[torch.Tensor]) -> None:
        """Note which of these an optimizer has changed: those that have a gradient."""
        self._stepped.update(id(param) for param in params if param.grad is not None)

    def _version(self, name: str) -> Version:
        return version_of(self._arena.tensors[name]), self._arena.num_moves[name]

    def _has_changed(self, name: str) -> bool:
        known, now = self._versions[name], self._version(name)
        return known != now or id(self._arena.tensors[name]) in self._stepped

    def _has_values(self, name: str) -> bool:
        known = self._values.get(name)
        return known is None or torch.equal(known, fingerprint(self._arena.tensors[name]))

    def note_data(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        """Note the values that a parameter has before somebody has its memory."""
        self.note_alias(param)

    def note_alias(self, param: torch.Tensor) -> None:
        """Note the values that a parameter has before somebody has its memory."""
        if self._names is None:
            self._names = {id(self._arena.tensors[name]): name for name in self._versions}
        name = self._names.get(id(param))
        if name is not None and name not in self._values:
            self._values[name] = fingerprint(param)


def _is_open(arena: HostArena, name: str) -> bool:
    """Whether a tensor can change without a word."""
    tensor = arena.tensors[name]
    return not isinstance(tensor, nn.Parameter) or shares_memory(tensor)


_trained: weakref.WeakSet[HostArena] = weakref.WeakSet()
_hooks: list[Any] = []


def _check_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if isinstance(optimizer, torch.optim.SparseAdam):
        ours = {id(tensor) for arena in list(_trained) for tensor in arena.tensors.values()}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            check_takes_dense(optimizer)
