"""Gradients that alias the host arena."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from harmony.errors import HarmonyError
from harmony.runtime.host.arena import HostArena
from harmony.runtime.host.pinned_memory import tensor_on


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
