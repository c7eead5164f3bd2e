"""Runs the user's own loss function in the place of the steps that it was recorded as.

So it may read and write what it likes, whenever it runs: once for each microbatch.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

import torch

from harmony.capture.eager.own_python import OnDevice
from harmony.capture.graph.trace import UNKNOWN, Trace
from harmony.capture.replay.replay import GuardError, Values, resolve, surroundings
from harmony.capture.replay.shell import ModuleShell
from harmony.capture.trace.isolation import user_frame_of

_TURN = threading.Lock()
"""Replicas run their losses one after the other: the function may be written for one thread."""


class _OtherUseError(Exception):
    """The loss function uses what it did not when it was recorded."""


class _Unused(torch.Tensor):
    """Stands for an output that the loss function did not use: it may only be looked at."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _OtherUseError


def run_loss(trace: Trace, values: Values, shell: ModuleShell) -> torch.Tensor:
    """Call the loss function with the values of a microbatch.

    Raises:
        GuardError: if it uses other outputs of the model than when it was recorded, or gives
            a loss of another form.
    """
    call = trace.loss_call
    assert call is not None
    out, targets = call.structure.unflatten(
        [_unused() if x is UNKNOWN else resolve(x, values, shell) for x in call.leaves]
    )
    with ExitStack() as stack:
        stack.enter_context(_TURN)
        stack.enter_context(surroundings(call.context, shell.device))
        stack.enter_context(OnDevice(shell.device))
        try:
            loss = call.loss(out, targets)
        except _OtherUseError as error:
            raise GuardError(
                "the loss uses another output of the model than when it was captured",
                user_frame_of(error),
            ) from None
    recorded = trace.values[call.result]
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        loss = loss.reshape(recorded.shape)  # one element is as good as a scalar
    if not isinstance(loss, torch.Tensor) or (tuple(loss.shape), loss.dtype) != (
        recorded.shape,
        recorded.dtype,
    ):
        raise GuardError("the loss has another form than when it was captured", "the loss")
    return loss.to(shell.device)


def _unused() -> torch.Tensor:
    return torch.empty(0).as_subclass(_Unused)
