"""Keeps what a trace does away from the user's program: random states, one trace at a time."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from harmony.capture.state.random_state import GeneratorStates
from harmony.core.files import PACKAGE

_TRACING = threading.RLock()
_HIDDEN = (
    "<",
    str(PACKAGE / "capture") + os.sep,
    str(Path(torch.__file__).parent) + os.sep,
)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, the device, Python and NumPy afterwards."""
    with _TRACING:
        before, on_device = GeneratorStates.now(), _device_random_state(device)
        try:
            yield
        finally:
            before.restore()
            if on_device is not None:
                torch.get_device_module(device).set_rng_state(on_device, device)


@contextmanager
def no_cast_cache() -> Iterator[None]:
    """Let autocast keep no copies of weights meanwhile.

    It keeps them, and the weights with them, until the outermost autocast of the thread ends:
    that may be the caller's.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def user_frame() -> str:
    """File and line of the innermost call that is neither torch's nor ours."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not is_machinery(filename):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def held_by_variables(until: CodeType) -> Iterator[torch.Tensor]:
    """Yield the tensors in variables of the user's functions that run now.

    Args:
        until: the code of the function of ours that has called them.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        if not is_machinery(frame.f_code.co_filename):
            for held in frame.f_locals.values():
                inner = held.values() if isinstance(held, dict) else held
                several = inner if isinstance(held, (list, tuple, dict)) else (held,)
                yield from (one for one in several if isinstance(one, torch.Tensor))
        frame = frame.f_back


def is_machinery(filename: str) -> bool:
    """Whether a file is torch's, ours, or between the user's functions."""
    return filename.startswith(_HIDDEN) or filename.endswith(("contextlib.py", "functools.py"))


def autocast_dtype() -> torch.dtype | None:
    """The type that autocast casts to now, on whatever device it is enabled for."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else (accelerator.type, "cpu")
    for kind in kinds:
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None


def _device_random_state(device: torch.device) -> torch.Tensor | None:
    if device.type == "cpu":
        return None
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def user_frame_of(error: BaseException) -> str:
    """File and line where the user's code raised an error."""
    place = "?"
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not is_machinery(filename):
            place = f"{filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
