"""What identifies a call of a model: all that decides what is computed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harmony.capture import Batch, autocast_dtype, is_plain, plain_attributes
from harmony.errors import ConfigError

Signature = tuple[Any, ...]
"""All of a call that changes what is computed, but for the number of samples."""

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Positional arguments, keyword arguments, targets."""

Attribute = tuple[str, str]
"""Name of a module, and of an attribute of it."""

_DEPTH = 3
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def signature_of(
    net: nn.Module,
    call: Call,
    form: str,
    batch_dims: Mapping[str, int | None],
    moving: Container[Attribute] = (),
) -> tuple[Signature, int]:
    """Return what identifies a call, and its number of samples.

    Beside the inputs it holds what the forward's Python may look at: modes, hooks, and the plain
    attributes of modules and of their configurations.

    Args:
        batch_dims: as for `harmony.capture.capture`.
        moving: attributes that the forward itself changes.

    Raises:
        ConfigError: if there is no tensor one of whose dimensions could count samples.
    """
    batch = Batch.of(*call, batch_dims)
    sized = [x for x in batch.leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
    if not sized:
        raise ConfigError("no input is a tensor whose dimension 0 could count samples")
    if batch.num_samples == 0:
        raise ConfigError("the batch is empty: dimension 0 of the inputs is 0")
    if form == "step" and any(x.requires_grad for x in sized):
        shape = next(tuple(x.shape) for x in sized if x.requires_grad)
        raise ConfigError(
            f"train_step with an input of shape {shape} that requires a gradient, which a whole "
            "step does not give. Call the model and loss.backward() instead, or detach() the input"
        )
    pairs = zip(batch.leaves, batch.batch_dims, strict=True)
    described = tuple(_describe(leaf, dim) for leaf, dim in pairs)
    trained = tuple(param.requires_grad for param in net.parameters())
    state = tuple(_python_state(net, moving))
    key = (form, str(batch.structure.spec), described, trained, autocast_dtype(), state)
    return key, batch.num_samples


def _describe(leaf: Any, batch_dim: int | None) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    shape = tuple(-1 if dim == batch_dim else size for dim, size in enumerate(leaf.shape))
    return shape, leaf.dtype, leaf.requires_grad


def _python_state(net: nn.Module, moving: Container[Attribute]) -> Iterator[Any]:
    configs: dict[int, Any] = {}
    for name, module in net.named_modules():
        yield module.training
        for attribute, held in plain_attributes(module):
            if (name, attribute) not in moving:
                yield attribute, repr(held)
        for hooks in _HOOKS:
            if module.__dict__[hooks]:
                yield hooks, tuple(module.__dict__[hooks])
        for held in module.__dict__.values():
            if _is_config(held):
                configs[id(held)] = held
    for config in configs.values():
        yield _text(config, _DEPTH)


def _is_config(held: Any) -> bool:
    """Whether an object holds attributes of its own that the forward may look at."""
    if is_plain(held) or isinstance(held, (torch.Tensor, nn.Module)) or callable(held):
        return False
    return hasattr(held, "__dict__") and not isinstance(held, dict)


def _text(config: Any, depth: int) -> str:
    parts = []
    for name, held in vars(config).items():
        if is_plain(held):
            parts.append(f"{name}={held!r}")
        elif depth and _is_config(held):
            parts.append(f"{name}=({_text(held, depth - 1)})")
    return " ".join(parts)
