"""Gradients that alias the host arena, and the watch over parameters in it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
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
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.pinned_memory import tensor_on
from harmony.runtime.update.optimizer import check_takes_dense


class AliasedGradients:
    """Gradients that autograd holds as views of the arena, where the next backward writes.

    A second copy of all gradients would double their host memory, so autograd is handed the
    arena's own bytes: usually it keeps them as ``param.grad``. Before the next backward overwrites
    them, whoever still holds one (``param.grad`` to be added to, a list of the user's, a sum that
    autograd has not finished) gets a copy put under the very tensor that it holds. A view that
    somebody has made of one cannot be moved: there is a warning if one is still in use.
    """

    def __init__(self, arena: HostArena, params: Mapping[str, torch.Tensor]) -> None:
        self._arena = arena
        self._params = params
        self._aliased: list[weakref.ref[torch.Tensor]] = []
        self._memory: dict[str, weakref.ref[Any]] = {}

    def hand_out(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the gradients of these parameters, for autograd; only within a backward."""
        lent = {name: self._lend(name) for name in names}
        self._aliased += [weakref.ref(gradient) for gradient in lent.values()]
        given = [self._params[name] for name in lent]
        # What autograd puts into param.grad is another tensor of the same memory.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._note(given))
        return lent

    def take_back(self) -> None:
        """Give everybody who still holds a gradient of an earlier backward a copy of it."""
        held = [gradient for ref in self._aliased if (gradient := ref()) is not None]
        self._aliased.clear()
        grads = [self._params[name].grad for name in self._arena.views if name in self._params]
        held += [grad for grad in grads if grad is not None]
        for gradient in held:
            if self._is_in_arena(gradient):
                gradient.data = gradient.detach().clone()
        del held
        for name, memory in self._memory.items():
            if memory() is not None:
                self._arena.warn_of_view(name)
        self._memory.clear()

    def _lend(self, name: str) -> torch.Tensor:
        """Make a tensor of a parameter's gradient in a storage of its own, to see when it dies."""
        buffer, place = self._arena.home(name)
        memory = buffer.bytes_of(place)
        self._memory[name] = weakref.ref(memory)
        return tensor_on(memory, place)

    def _note(self, params: Iterable[torch.Tensor]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        self._aliased += [weakref.ref(grad) for grad in grads if self._is_in_arena(grad)]

    def _is_in_arena(self, tensor: torch.Tensor) -> bool:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return False
        return self._arena.covers(tensor.data_ptr())


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


def check_unchanged(then: Mapping[str, Version], arena: HostArena, names: Iterable[str]) -> None:
    """Refuse a backward that would recompute with other weights than its forward had.

    Args:
        then: versions when the forward ran; of ``names``, those that are not in it may change.

    Raises:
        HarmonyError: naming the tensors that changed; plain PyTorch refuses it too.
    """
    names = [name for name in names if name in then]
    now = versions(arena, names)
    changed = [name for name in names if now[name] != then[name]]
    if not changed:
        return
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    what = "parameter" if isinstance(arena.tensors[changed[0]], nn.Parameter) else "buffer"
    raise HarmonyError(
        f"backward() after {what} {changed[0]}{more} had been changed (by optimizer.step(), "
        "load_state_dict() or an in-place operation) since its forward: the gradients would "
        "belong to neither. Call backward() before the parameters change, or run the forward again"
    )


def check_plain(net: nn.Module) -> None:
    """Refuse tensors that stand in for parameters (`torch.func.functional_call`).

    Raises:
        HarmonyError: naming a parameter.
    """
    for name, param in net.named_parameters():
        if not isinstance(param, nn.Parameter):
            raise HarmonyError(
                f"parameter {name} is not the model's own: a tensor stands in for it "
                "(torch.func.functional_call). Copy values into the parameter (param.copy_(...) "
                "under no_grad, load_state_dict) and call the model"
            )


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
