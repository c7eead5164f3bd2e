"""The tensors of a module that a checkpoint holds, and where they go when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harmony.checkpoint.store import Stored
from harmony.errors import ConfigError
from harmony.weights.checkpoint_files import StoredTensor
from harmony.weights.meta_init import make_room


def weights_of(net: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]:
    """Tensors of the state dict by name, each once; other names of the same; what is no tensor."""
    found: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    others: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            others[name] = value
        elif id(value) in first:
            shared[name] = first[id(value)]
        else:
            first[id(value)] = name
            found[name] = value
    return found, shared, others


def targets_in(
    net: nn.Module, stored: Stored, weights: Mapping[str, StoredTensor], shared: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Which tensor each stored one goes to.

    Raises:
        ConfigError: naming what does not fit.
    """
    mine, mine_shared, _ = weights_of(net)
    if mine.keys() != weights.keys() or mine_shared != shared:
        ours, theirs = mine.keys() | mine_shared.keys(), weights.keys() | shared.keys()
        differ = sorted(ours ^ theirs) or sorted({*mine_shared} ^ {*shared})
        raise ConfigError(
            f"{stored.folder} is of another model: {len(differ)} names are in one of them only, "
            f"or shared in one of them only, {', '.join(differ[:4])} for instance"
        )
    for name, tensor in mine.items():
        known = weights[name]
        if (tuple(tensor.shape), tensor.dtype) != (known.shape, known.dtype):
            raise ConfigError(
                f"{stored.folder} is of another model: {name} is {known.dtype} {known.shape} "
                f"there, {tensor.dtype} {tuple(tensor.shape)} here"
            )
    if any(tensor.is_meta for tensor in mine.values()):
        make_room(net, _placeholders(mine))
        mine, _, _ = weights_of(net)
    return mine


def _placeholders(mine: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the right shapes without memory, for those on the meta device."""
    return {n: torch.zeros(()).expand(t.shape) for n, t in mine.items() if t.is_meta}


def buffers_besides(net: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are in no state dict: a forward may change them all the same."""
    known = net.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in net.named_buffers() if name not in known}


def set_buffers(net: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give a module the buffers that `buffers_besides` has found, in place where they fit."""
    modules = dict(net.named_modules())
    for path, value in buffers.items():
        owner, _, name = path.rpartition(".")
        held = modules[owner]._buffers.get(name)
        if held is not None and held.shape == value.shape and held.dtype == value.dtype:
            with torch.no_grad():
                held.copy_(value)
        else:
            modules[owner].register_buffer(name, value, persistent=False)
