"""What a backward reads again from the host: whether it is as the forward found it.

Plain PyTorch keeps the results of a layer for its backward. Harmony makes them again, from the
weights. Where the weights have other values by then, the gradients would differ: such a backward
is refused. PyTorch's version counters tell of operations in place, and its hooks of optimizers.
Who writes past both (``param.data``, a NumPy array) needs the memory. So the values are compared
of parameters whose memory somebody has while the forward runs, or gets hold of before the
backward; and of buffers, which are small.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from harmony.capture.graph.params import version_of
from harmony.errors import HarmonyError
from harmony.runtime import data_watch
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.memory_holders import shares_memory
from harmony.runtime.update.optimizer import check_takes_dense

Version = tuple[int, int, int]
"""How often a tensor was changed: by in-place operations, by optimizers, by a new value's move
into the arena."""

_steps_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_hooks: list[Any] = []


def watch(params: Iterable[nn.Parameter]) -> None:
    """Count the optimizer steps that change these parameters from now on.

    Fused optimizers do not count as in-place operations: autograd itself does not see them.
    """
    for param in params:
        if param not in _steps_of:
            _steps_of[param] = 0
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_count_step))
        _hooks.append(register_optimizer_step_pre_hook(_check_step))


def versions(arena: HostArena, names: Iterable[str]) -> dict[str, Version]:
    """Return the versions of some of the watched parameters, and of buffers."""
    return {name: _version_of(arena, name) for name in names}


def _version_of(arena: HostArena, name: str) -> Version:
    tensor = arena.tensors[name]
    steps = _steps_of.get(tensor, 0)  # type: ignore[no-untyped-call]
    return version_of(tensor), steps, arena.num_moves[name]


class ReadAgain:
    """The parameters and buffers of one forward, as they were when it ran."""

    def __init__(self, arena: HostArena, written: Container[str]) -> None:
        """Note how they are.

        Args:
            written: buffers that the forward itself changes; they may have other values.
        """
        names = [name for name in arena.tensors if name not in written]
        self._arena = arena  # not the tensors: who else holds one, others go by
        self._versions = versions(arena, names)
        self._values = {
            name: fingerprint(arena.tensors[name]) for name in names if _is_open(arena, name)
        }
        self._names: dict[int, str] | None = None
        data_watch.listen(self, detached=True)

    def check(self, names: Iterable[str]) -> None:
        """Refuse a backward that would read other values of these than its forward did.

        Raises:
            HarmonyError: naming the tensors that changed.
        """
        names = [name for name in names if name in self._versions]
        now = versions(self._arena, names)
        changed = [name for name in names if now[name] != self._versions[name]]
        how = "by optimizer.step(), load_state_dict() or an in-place operation"
        if not changed:
            changed = [name for name in names if not self._has_values(name)]
            how = "through its .data, an array, or other memory that is the same"
        if not changed:
            return
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        what = (
            "parameter" if isinstance(self._arena.tensors[changed[0]], nn.Parameter) else "buffer"
        )
        raise HarmonyError(
            f"backward() after {what} {changed[0]}{more} had been changed ({how}) since its "
            "forward: the gradients would belong to neither. Call backward() before the "
            f"{what}s change, or run the forward again"
        )

    def _has_values(self, name: str) -> bool:
        known = self._values.get(name)
        return known is None or torch.equal(known, fingerprint(self._arena.tensors[name]))

    def _note(self, param: torch.Tensor, alias: torch.Tensor | None) -> None:
        if self._names is None:
            self._names = {id(self._arena.tensors[name]): name for name in self._versions}
        name = self._names.get(id(param))
        if name is not None and name not in self._values:
            self._values[name] = fingerprint(param)


def _is_open(arena: HostArena, name: str) -> bool:
    """Whether a tensor can change without a word."""
    tensor = arena.tensors[name]
    return not isinstance(tensor, nn.Parameter) or shares_memory(tensor)


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return what shows, as good as surely, whether a tensor has the same values as another.

    A small one is copied. Of a larger one the 64-bit words, in rows of 1,024, are summed up by row
    and by column, so that values which have changed places show as well.
    """
    plain = torch.Tensor.detach(tensor)  # a parameter's own one is watched
    flat = plain.reshape(-1).view(torch.uint8)
    num_rows = flat.numel() // (8 * _ROW)
    if num_rows < _ROWS_AT_LEAST:
        return flat.clone()
    cut = 8 * _ROW * num_rows
    grid = flat[:cut].view(torch.int64).view(num_rows, _ROW)
    return torch.cat([grid.sum(0), grid.sum(1), flat[cut:].to(torch.int64)])


_ROW = 1024
_ROWS_AT_LEAST = 8


def _check_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if isinstance(optimizer, torch.optim.SparseAdam) and any(
        param in _steps_of for group in optimizer.param_groups for param in group["params"]
    ):
        check_takes_dense(optimizer)


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param in _steps_of:
                _steps_of[param] += 1
