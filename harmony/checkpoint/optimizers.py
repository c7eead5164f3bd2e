"""The state of optimizers by the names of parameters: an order of theirs may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from harmony.core.files import DAMAGED
from harmony.core.units import format_bytes
from harmony.errors import ConfigError, NotSavedError
from harmony.runtime.host.limits import available_host_nbytes


def is_of(held: Any, net: nn.Module) -> bool:
    """Whether something is an optimizer all of whose parameters are the module's."""
    if not isinstance(held, torch.optim.Optimizer):
        return False
    known = {id(param) for param in net.parameters()}
    return all(id(param) in known for group in held.param_groups for param in group["params"])


def state_of(optimizer: torch.optim.Optimizer | None, net: nn.Module) -> Any:
    """State by name of parameter, and groups with names in the place of parameters."""
    if optimizer is None:
        return None
    names = {id(param): name for name, param in net.named_parameters()}
    _check_room(optimizer)
    saved = optimizer.state_dict()
    numbered = [p for group in optimizer.param_groups for p in group["params"]]
    order = [names[id(param)] for param in numbered]
    keys = {key: order[key] for key in saved["state"] if isinstance(key, int)}
    held = saved["state"]
    # In the order of the groups, whatever the order was in which a plan has updated them first.
    state = {keys[key]: held[key] for key in sorted(keys)}
    state.update((key, value) for key, value in held.items() if key not in keys)
    groups = [
        {**group, "params": [order[index] for index in group["params"]]}
        for group in saved["param_groups"]
    ]
    rest = {k: v for k, v in saved.items() if k not in ("state", "param_groups")}
    return {"class": type(optimizer).__name__, "state": state, "groups": groups, "rest": rest}


def _check_room(optimizer: torch.optim.Optimizer) -> None:
    """Refuse to copy state from devices to a host that has no memory for it.

    Raises:
        NotSavedError: with the bytes.
    """
    held = (t for state in optimizer.state.values() for t in state.values())
    away = [t.nbytes for t in held if isinstance(t, torch.Tensor) and t.device.type != "cpu"]
    free = available_host_nbytes() if away else 0
    if sum(away) > free:
        raise NotSavedError(
            f"{format_bytes(sum(away))} of optimizer state lie on GPUs, and the host has "
            f"{format_bytes(free)} free to copy them to (cgroup limit included): nothing was "
            "saved. updates='host' keeps that state on the host"
        )


def check_state(
    optimizer: torch.optim.Optimizer | None, net: nn.Module, saved: Any, what: str
) -> None:
    """Refuse the state of another optimizer.

    Raises:
        ConfigError: naming what differs.
    """
    if optimizer is None and saved is None:
        return
    here = "none" if optimizer is None else type(optimizer).__name__
    try:
        there = "none" if saved is None else saved["class"]
        held = [] if saved is None else [list(group["params"]) for group in saved["groups"]]
        of_params = [saved["state"].get(name, {}) for group in held for name in group]
        if not all(isinstance(state, dict) for state in of_params):
            raise TypeError("the state of a parameter is no dict")
    except DAMAGED as error:
        raise ConfigError(f"the state of {what} cannot be read ({error!r})") from None
    if optimizer is None or saved is None or here != there:
        raise ConfigError(f"{what} was {there} when the checkpoint was written, now it is {here}")
    names = {id(param): name for name, param in net.named_parameters()}
    ours = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if ours != held:
        raise ConfigError(
            f"{what} has other parameters or groups than in the checkpoint: "
            f"{[len(group) for group in held]} parameters a group there, "
            f"{[len(group) for group in ours]} here"
        )


def load_state(optimizer: torch.optim.Optimizer | None, net: nn.Module, saved: Any) -> None:
    """Give an optimizer the state that `check_state` has found to be its own."""
    if optimizer is None:
        return
    params = dict(net.named_parameters())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {id(param): number for number, param in enumerate(order)}
    number = {name: index[id(param)] for name, param in params.items() if id(param) in index}
    state = {number.get(key, key): value for key, value in saved["state"].items()}
    groups = [{**g, "params": [number[n] for n in g["params"]]} for g in saved["groups"]]
    optimizer.load_state_dict({**saved["rest"], "state": state, "param_groups": groups})
    # PyTorch gives state the type of its parameter: what was wider stays wider.
    for name, held in saved["state"].items():
        if name in number and isinstance(held, Mapping):
            kept = optimizer.state[params[name]]
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and kept[key].dtype != value.dtype:
                    kept[key] = value
