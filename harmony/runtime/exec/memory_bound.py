"""A limit of device memory that PyTorch's allocator keeps to while a schedule runs first.

A plan counts tensors. The allocator takes memory from the driver in segments of 2 and 20 MiB or
more, and the gaps between tensors belong to it, too. In the first two runs of a schedule it is
told the limit: what does not fit raises an error before anything has changed, and the step is
planned again. Their updates are only looked at, since one that fails half way leaves a torn
state. Later runs take the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harmony.core.units import format_bytes
from harmony.runtime import native
from harmony.runtime.device import DeviceContext

LEAST_NBYTES = 64 * 2**20
"""Below this a limit says what tensors take: a few segments alone would be more than it."""


BOUND_RUNS = 2
"""In the second, what the updates of the first have made lies there."""


def is_held(device: torch.device, limit_nbytes: int | None) -> bool:
    """Whether the allocator is held to a limit; a virtual GPU holds its own itself."""
    known = limit_nbytes is not None and limit_nbytes >= LEAST_NBYTES
    return known and not native.is_virtual(device)


class MemoryBound:
    """Holds the allocator of each real GPU to a limit, from its making until `lift`."""

    def __init__(
        self, contexts: Sequence[DeviceContext], held_nbytes: Sequence[int], limit_nbytes: int
    ) -> None:
        """Begin.

        Args:
            held_nbytes: per device, what of its tensors is Harmony's; those of the script come on
                top of the limit.
        """
        self._allowed: list[tuple[DeviceContext, int]] = []
        self._before: list[tuple[DeviceContext, float]] = []
        for context, held in zip(contexts, held_nbytes, strict=True):
            allowed = limit_nbytes + max(0, context.taken_nbytes()[1] - held)
            self._allowed.append((context, allowed))
            self._before.append((context, native.bound_reserved(context.device, allowed)))

    def approve(self, *, compact: bool) -> None:
        """Lift the bound before the first update: none may fail half way.

        Args:
            compact: whether the updates make what stays, which is not to lie in the gaps that the
                backward has left.
        """
        if self._before and compact:
            torch.accelerator.empty_cache()
        self.lift()

    def lift(self) -> None:
        """Let the allocator take what it took before."""
        while self._before:
            context, before = self._before.pop()
            native.unbound_reserved(context.device, before)

    def excess(self) -> str:
        """Say where more was reserved than the limit after all; "" if nowhere."""
        for context, allowed in self._allowed:
            reserved = native.peak_reserved_nbytes(context.device)
            if reserved > allowed:
                return (
                    f"PyTorch reserved {format_bytes(reserved)} on {context.device}, of which "
                    f"{format_bytes(allowed)} may be used"
                )
        return ""
