"""What is raised of a step that has failed: where, why, and what became of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from harmony.errors import ExecutionError, HarmonyError, PeerError, text_of
from harmony.runtime import native
from harmony.runtime.step.step import Step


def raise_error(
    where: str, error: BaseException, step: Step, devices: Sequence[torch.device]
) -> NoReturn:
    """Raise what a thread of a step has failed with, in the words of the whole step.

    Args:
        where: the instruction; empty where the step was stopped from outside.
        devices: on which nothing runs any more.
    """
    torn = bool(step.updated)
    try:
        if isinstance(error, KeyboardInterrupt) and not where:
            raise KeyboardInterrupt(f"Ctrl-C twice stopped the step. {_state_after(step)}")
        if not where or not isinstance(error, Exception):
            raise error
        if isinstance(error, HarmonyError) and not torn:
            raise error
        if isinstance(error, PeerError):  # it says itself what is left
            raise PeerError(text_of(error), where, torn=torn) from error
        if any(map(native.is_lost, devices)):
            raise native.device_lost(where, error, _state_after(step), torn=torn) from error
        raise ExecutionError(_explain(where, error, step), where, torn=torn) from error
    finally:
        del error  # its frames hold the step, and device memory with it


def _explain(where: str, error: BaseException, step: Step) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        reason = (
            f"out of memory, though the plan expected to fit: {text_of(error)}. Use a smaller "
            "microbatch_size, or a device_memory below what the GPU really has free"
        )
    else:
        reason = f"{type(error).__name__}: {text_of(error)}"
    return f"{where} failed. {reason}. {_state_after(step)}."


def _state_after(step: Step) -> str:
    """What a step that did not come to its end has left."""
    if not step.updated:
        return "No parameter was changed: all are of the step before"
    return (
        f"Parameters of {', '.join(step.updated)} may be of the step after already, the others "
        "are of the step before: go back to a checkpoint"
    )
