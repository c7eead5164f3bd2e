"""Calls by which a forward changes autograd's graph, or the memory of a tensor: not replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harmony.capture.trace.isolation import user_frame
from harmony.capture.trace.refuse import DynamicOnlyError
from harmony.errors import ConfigError

_TENSOR: Any = torch.Tensor
_SET = _TENSOR.requires_grad.__set__
_SET_DATA = frozenset({_TENSOR.data.__set__, _TENSOR.set_})
CHANGES_GRAPH = frozenset({_TENSOR.requires_grad_, _TENSOR.detach_, _SET}) | _SET_DATA
"""Functions that say anew what a tensor's gradient, or its memory, is."""


def check_graph_change(
    func: Any,
    args: Any,
    kwargs: Any,
    is_parameter: Callable[[Any], bool],
    is_input: Callable[[Any], bool],
) -> None:
    """Let a module run as it is if its forward freezes parameters, cuts values off, or puts other
    memory under a tensor, which no version counter tells (``param.data = values``).

    Raises:
        DynamicOnlyError: naming the line.
        ConfigError: if it lets an input require a gradient, which is the caller's tensor.
    """
    tensor = args[0]
    if func is _TENSOR.detach_:
        raise DynamicOnlyError("the forward calls detach_ on a tensor", user_frame(), eager=True)
    if func in _SET_DATA:
        raise DynamicOnlyError(
            "the forward replaces the data of a tensor", user_frame(), eager=True
        )
    wanted = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if bool(wanted) == tensor.requires_grad:
        return
    if is_parameter(tensor):
        raise DynamicOnlyError(
            "the forward changes which parameters require a gradient", user_frame(), eager=True
        )
    if is_input(tensor):
        raise ConfigError(
            f"the forward changes at {user_frame()} whether an input requires a gradient: the "
            "caller's tensor would not be changed. Call requires_grad_() before the model, or on "
            "x.detach() in the forward"
        )
