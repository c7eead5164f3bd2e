"""The step of a `torch.optim` optimizer for some of its parameters at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harmony.runtime.update.native_step import own_step, take_step


def step_part(
    full: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    copies: Sequence[nn.Parameter] | None = None,
    working: Mapping[int, torch.Tensor] | None = None,
    options: Sequence[Mapping[str, Any]] | None = None,
    scale: float = 1.0,
    scaled: Callable[[Iterable[nn.Parameter]], None] = lambda _: None,
) -> set[int]:
    """Take the step for some parameters, or for what stands for them on a device.

    The class's own step runs on an optimizer that has these parameters only, in the groups of the
    full one, with their state; what the step leaves as their state is the full one's then. What
    else it writes, to groups or attributes, is lost: see `harmony.runtime.update.coupling`. On the
    host a kernel takes the step where it computes the same.

    Args:
        copies: what stands for the parameters on a device.
        working: bf16 copies of parameters, by their identity.
        options: what the groups held, where that is not what they hold now.
        scale: what gradients are multiplied by, which a kernel does in its pass.
        scaled: multiplies the gradients of those for which none does.

    Returns:
        The parameters, by identity, whose copy has their new values already.
    """
    stand_ins = dict(zip(map(id, params), copies or params, strict=True))
    part = object.__new__(type(full))
    part.__dict__.update(full.__dict__)
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    part.state = state
    part.param_groups = []
    for group in full.param_groups if options is None else options:
        chosen = [p for p in group["params"] if id(p) in stand_ins]
        for param in chosen:
            if full.state.get(param):
                stand_in = stand_ins[id(param)]
                state[stand_in] = moved(full.state[param], stand_in.device, group)
        if chosen:
            given = {**group, "params": [stand_ins[id(p)] for p in chosen]}
            if copies is not None and given.get("foreach", 0) is None:
                # On a GPU torch would choose other operations than on the host, with other
                # last bits: results must not depend on where the plan updates.
                given["foreach"] = False
            part.param_groups.append(given)
    copied, left = take_step(part, working or {}, scale) if copies is None else (set(), True)
    if left:
        scaled([param for group in part.param_groups for param in group["params"]])
        own_step(part)
    for param in params:
        if stand_ins[id(param)] in state:
            full.state[param] = state[stand_ins[id(param)]]
    return copied


def moved(state: dict[str, Any], device: torch.device, group: Mapping[str, Any]) -> dict[str, Any]:
    """Move the state of a parameter to a device; scalars as well only where kernels want that."""
    scalars_too = bool(group.get("fused") or group.get("capturable"))
    for key, held in state.items():
        if isinstance(held, torch.Tensor) and (held.dim() or scalars_too):
            state[key] = held if held.device == device else _copied(held, device)
    return state


def _copied(held: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device; from another one by way of the host, which waits for it.

    A copy between devices would still read when the memory of the old tensor is given back on a
    stream that does not know of it. That a pack moves is rare.
    """
    return (held if held.device.type == "cpu" else held.cpu()).to(device)
