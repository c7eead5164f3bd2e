"""What runs out of a device's memory: tried again without garbage, then refused with the bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from harmony.core.units import format_bytes
from harmony.errors import DoesNotFitError, ExecutionError, text_of
from harmony.runtime import native

R = TypeVar("R")


def with_room(what: str, devices: Sequence[torch.device], run: Callable[[], R]) -> R:
    """Return what ``run`` does; once more, after collecting garbage, if memory runs out.

    What nobody holds any more may still have memory of a device, where it is part of a cycle.

    Args:
        what: names it for the error.
        run: leaves nothing half done when it fails.

    Raises:
        DoesNotFitError: if it runs out of memory again.
    """
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # only behind this line is what its frames hold garbage, too
    gc.collect()
    torch.accelerator.empty_cache()
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(what, devices, error) from error


def is_undone(error: ExecutionError | DoesNotFitError, begun: Sequence[str]) -> bool:
    """Whether a call ran out of device memory before it had changed anything.

    Args:
        begun: what it has begun to change.
    """
    return isinstance(error.__cause__, torch.OutOfMemoryError) and not begun


def out_of_memory(
    what: str, devices: Sequence[torch.device], error: torch.OutOfMemoryError
) -> DoesNotFitError:
    """Return the error that says how much there was, and what to change."""
    sizes = []
    for device in devices:
        free, total = native.memory_info(device)
        sizes.append(f"{format_bytes(free)} of {format_bytes(total)} are free on {device}")
    return DoesNotFitError(
        f"{what} ran out of device memory: {text_of(error)} ({'; '.join(sizes)}). No parameter "
        "was changed. Use a smaller microbatch_size, or a device_memory below what is really "
        "free, and let go of tensors of your own on the GPU"
    )
