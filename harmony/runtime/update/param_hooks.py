"""Hooks on parameters: called by autograd itself, on gradients that it did not make.

A step computes on copies of the parameters, of which the user's hooks know nothing. What plain
PyTorch does with a gradient that arrives at a parameter (hooks that replace it, the sum with what
is there, hooks after that) it does here with the one that the step has left on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn


def is_hooked(param: torch.Tensor) -> bool:
    """Whether there is anything to call when a gradient arrives."""
    return bool(param._backward_hooks or param._post_accumulate_grad_hooks)


def any_hooked(params: Iterable[torch.Tensor]) -> bool:
    """Whether that is so of any of these; no function is called for each, as every step asks."""
    for param in params:  # noqa: SIM110
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            return True
    return False


def arrive(param: nn.Parameter, gradient: torch.Tensor) -> None:
    """Let a gradient arrive at a parameter, whose ``grad`` holds the sum so far, or None."""
    if not param.requires_grad:
        return
    with torch.enable_grad():
        torch.autograd.backward([param], [gradient])


def call_hooks(params: Iterable[nn.Parameter]) -> None:
    """Let complete gradients, which lie in ``grad``, arrive; each hook is called once.

    The sum stays where it lies, unless a hook takes it away.
    """
    for param in reversed(list(params)):
        place = param.grad
        if place is None or not is_hooked(param):
            continue
        param.grad = None
        arrive(param, place)
        if param.grad is not None and param.grad is not place:
            param.grad = place.copy_(param.grad)


class GradientSums:
    """Sums of the gradients that microbatches leave, one after the other, in ``grad``.

    Attributes:
        sums: by name of the parameter.
        hooked: whether there are hooks to be called at each of them.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], hooks_each: bool) -> None:
        """Sum gradients of these; call the hooks at each of them, if ``hooks_each``."""
        self.sums: dict[str, torch.Tensor] = {}
        self._params = params
        self.hooked = hooks_each and any_hooked(params.values())

    def add(self) -> None:
        """Add what the last microbatch has left; ``grad`` is the sum then."""
        for name, param in reversed(list(self._params.items())):
            new, param.grad = param.grad, self.sums.get(name)
            if new is None:
                continue
            if self.hooked and is_hooked(param):
                arrive(param, new)
            elif param.grad is not None:
                param.grad.add_(new)
            else:
                param.grad = new.clone()
            if param.grad is None:
                self.sums.pop(name, None)
            else:
                self.sums[name] = param.grad

    def publish(self, place_of: Callable[[str], torch.Tensor]) -> None:
        """Let every parameter have its sum, in the gradient's own place."""
        for name, param in self._params.items():
            param.grad = None
            if name in self.sums:
                param.grad = place_of(name).copy_(self.sums[name])
