"""What autograd and the host arena share: gradients lent without a copy, parameters watched."""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from harmony.errors import HarmonyError
from harmony.runtime.hostmem import HostArena, view_bytes


class LentGradients:
    """Gradients that autograd holds as views of the arena, where the next backward writes.

    A second copy of all gradients would double their host memory, so autograd is handed the
    arena's own bytes: usually it keeps them as ``param.grad``. Before the next backward overwrites
    them, whoever still holds one (``param.grad`` to be added to, a list of the user's, a sum that
    autograd has not finished) gets a copy put under the very tensor that it holds. A view that
    somebody has made of one cannot be moved: there is a warning if one is still in use.
    """

    def __init__(self, arena: HostArena, params: Mapping[str, nn.Parameter]) -> None:
        self._arena = arena
        self._params = params
        self._low = arena.buffer.tensor.data_ptr()
        self._high = self._low + arena.buffer.tensor.numel()
        self._lent: list[weakref.ref[torch.Tensor]] = []
        self._memory: dict[str, weakref.ref[Any]] = {}
        self._has_warned = False

    def lend(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the gradients of these parameters, for autograd; only within a backward."""
        lent = {name: self._lend(name) for name in names}
        self._lent += [weakref.ref(gradient) for gradient in lent.values()]
        given = [self._params[name] for name in lent]
        # What autograd puts into param.grad is another tensor of the same memory.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._note(given))
        return lent

    def take_back(self) -> None:
        """Give everybody who still holds a gradient of an earlier backward a copy of it."""
        held = [gradient for ref in self._lent if (gradient := ref()) is not None]
        self._lent.clear()
        for name, param in self._params.items():
            if param.grad is None:
                continue
            if param.grad is self._arena.views.get(name):  # of a step form's step
                param.grad = param.grad.clone()
            else:
                held.append(param.grad)
        for gradient in held:
            if self._is_in_arena(gradient):
                gradient.data = gradient.detach().clone()
        del held
        self._warn_of([name for name, memory in self._memory.items() if memory() is not None])
        self._memory.clear()

    def _lend(self, name: str) -> torch.Tensor:
        """Make a tensor of a parameter's gradient in a storage of its own, to see when it dies."""
        place = self._arena.layout.places[name]
        whole = self._arena.buffer.tensor
        if not place.nbytes:
            return self._arena.buffer.view(place.offset, place)
        memory = (ctypes.c_char * place.nbytes).from_address(whole.data_ptr() + place.offset)
        weakref.finalize(memory, id, whole).atexit = False  # keeps the arena for as long
        self._memory[name] = weakref.ref(memory)
        # .data: a tensor that knows itself to be a view keeps hold of what it is a view of.
        return view_bytes(torch.frombuffer(memory, dtype=torch.uint8), 0, place).data

    def _warn_of(self, viewed: list[str]) -> None:
        if viewed and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a view of the gradient of {viewed[0]} from an earlier backward is still there "
                f"({len(viewed)} in all), and this backward overwrites what it shows: gradients "
                "have one place on the host. Keep param.grad itself, or clone() the view",
                stacklevel=2,
            )

    def _note(self, params: Iterable[nn.Parameter]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        self._lent += [weakref.ref(grad) for grad in grads if self._is_in_arena(grad)]

    def _is_in_arena(self, tensor: torch.Tensor) -> bool:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return False
        return self._low <= tensor.data_ptr() < self._high


Version = tuple[int, int]
"""How often a parameter was changed: by in-place operations, and by optimizers."""

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


def versions(params: Mapping[str, nn.Parameter]) -> dict[str, Version]:
    """Return the versions of watched parameters."""
    return {name: (param._version, _steps_of[param]) for name, param in params.items()}


def check_unchanged(
    then: Mapping[str, Version], params: Mapping[str, nn.Parameter], names: Iterable[str]
) -> None:
    """Refuse a backward that would recompute with other weights than its forward had.

    Raises:
        HarmonyError: naming the parameters that changed; plain PyTorch refuses it too.
    """
    names = list(names)
    now = versions({name: params[name] for name in names})
    changed = [name for name in names if now[name] != then[name]]
    if not changed:
        return
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise HarmonyError(
        f"backward() after parameter {changed[0]}{more} had been changed (by optimizer.step(), "
        "load_state_dict() or an in-place operation) since its forward: the gradients would "
        "belong to neither. Call backward() before the parameters change, or run the forward again"
    )


def check_own(net: nn.Module, known: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that are not those whose memory the arena is.

    Args:
        known: the parameters that moved into the arena; empty before the first batch.

    Raises:
        HarmonyError: naming a parameter that took another's place.
    """
    for name, param in net.named_parameters():
        other = bool(known) and known.get(name) is not param
        if other or not isinstance(param, nn.Parameter):
            raise HarmonyError(
                f"parameter {name} is not the one that Harmony has: it was assigned anew since "
                "the first batch, or stands in for it (torch.func.functional_call). Copy values "
                "into the parameter (param.copy_(...) under no_grad, load_state_dict), or make a "
                "new Harmony model"
            )


def _count_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param in _steps_of:
                _steps_of[param] += 1
