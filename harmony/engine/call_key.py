"""The key of a call: its kind, and all else that decides what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch

from harmony.capture import Batch, autocast_dtype, form_of, form_of_leaf, irregular_input
from harmony.capture.guards.torch_settings import torch_settings
from harmony.errors import ConfigError
from harmony.planner.ir.tasks import Phase
from harmony.runtime.host.arena import Modules

CallKey = tuple[Any, ...]
"""All of a call that changes what is computed, but for the number of samples."""

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments, targets."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CallKind(Enum):
    """Who runs the loss, the backward and the optimizer."""

    TRAIN_STEP = "train_step"
    """`Harmony.train_step`: all of them are Harmony's."""

    OWN_LOOP = "own loop"
    """The module is called, with or without gradients; the rest is the user's own loop."""

    @property
    def phase(self) -> Phase:
        """What is planned for such a call."""
        return Phase.TRAIN if self is CallKind.TRAIN_STEP else Phase.BACKWARD


def call_key_of(
    modules: Modules,
    call: Call,
    kind: CallKind,
    batch_dims: Mapping[str, int | None],
) -> tuple[CallKey, Batch, str | None]:
    """Return what identifies a call, its inputs, and why it runs whole, as it is.

    The last is None for a call that a recording can hold.

    Beside the inputs it holds which modules there are, their modes and hooks, and PyTorch's
    settings. What else the forward's Python reads is looked at by the guards of each capture.

    Args:
        modules: of the model.
        batch_dims: as for `harmony.capture.capture`.

    Raises:
        ConfigError: if there is no batch, if it is empty, or if an input of a whole step
            requires a gradient.
    """
    batch = Batch.of(*call, batch_dims)
    sized = [x for x in batch.leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
    whole = irregular_input(batch.leaves, batch.names, call)
    if whole is None and not sized:
        whole = "no input is a tensor whose dimension 0 could count samples"
        if not any(isinstance(leaf, torch.Tensor) for leaf in batch.leaves):
            raise ConfigError(f"{whole}. Give the model its batch as an argument")
    if sized and batch.num_samples == 0:
        raise ConfigError("the batch is empty: dimension 0 of the inputs is 0. Leave it out")
    if kind is CallKind.TRAIN_STEP and any(x.requires_grad for x in sized):
        shape = next(tuple(x.shape) for x in sized if x.requires_grad)
        raise ConfigError(
            f"train_step with an input of shape {shape} that requires a gradient, which a whole "
            "step does not give. Call the model and loss.backward() instead, or detach() the input"
        )
    described = tuple(map(_describe, batch.leaves, batch.batch_dims))
    form = kind, str(batch.structure.spec), batch.structure.places, described
    key = (*form, autocast_dtype(), torch_settings(), _state_of(modules))
    return key, batch, whole


def _describe(leaf: Any, batch_dim: int | None) -> Any:
    if not isinstance(leaf, torch.Tensor):
        compares: Any = type(leaf).__eq__  # of objects; the capture that one led to keeps it alive
        return (repr(leaf), id(leaf)) if compares is object.__eq__ else repr(leaf)
    if form_of(leaf) is not None:  # its shape may not be known
        return type(leaf), leaf.layout, leaf.dtype, leaf.requires_grad
    return form_of_leaf(leaf, batch_dim)


class _Parts:
    """Which modules a model has, and where: equal to that of the same ones only.

    It holds them, so that what takes the place of one is never known by the same number.
    """

    def __init__(self, modules: Modules) -> None:
        self._modules = modules
        found: list[Any] = []
        for _, module in modules:
            found += (id(module), type(module))
            if children := module._modules:
                found += (*children.keys(), *map(id, children.values()))
        self._ids = tuple(found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parts) and self._ids == other._ids

    def __hash__(self) -> int:
        return hash(self._ids)


def _state_of(modules: Modules) -> tuple[Any, ...]:
    """Which modules there are, what is trained, and their modes and hooks."""
    found: list[Any] = [_Parts(modules)]
    for _, module in modules:
        held = module.__dict__
        found.append(module.training)
        found += [p.requires_grad for p in module._parameters.values() if p is not None]
        found += [(hooks, tuple(held[hooks])) for hooks in _HOOKS if held[hooks]]
    return tuple(found)
