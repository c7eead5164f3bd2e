"""What the slots and staging buffers of a schedule hold; a tensor without a place is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from harmony.core.layergraph import LayerGraph
from harmony.core.units import aligned
from harmony.errors import ScheduleError
from harmony.planner.ir.schedule import Schedule, Slots
from harmony.planner.ir.tasks import TensorKind, TensorRef

Refuse = Callable[[str], ScheduleError]
"""Makes the error about the instruction that the walk is at."""


class SlotTable:
    """What each slot of each device holds."""

    def __init__(self, schedule: Schedule, graph: LayerGraph, refuse: Refuse) -> None:
        self.devices = schedule.devices
        self.graph = graph
        self.refuse = refuse
        self.held: dict[tuple[int, bool, int], list[TensorRef]] = defaultdict(list)

    def enter(self, device: int, ref: TensorRef, slot: int) -> None:
        """Put a tensor into a slot.

        Raises:
            ScheduleError: if it does not fit there.
        """
        spec, held = self.devices[device], self.held[device, ref.is_gradient_part, slot]
        limits = spec.gradient_slots if ref.is_gradient_part else spec.weight_slots
        by_layer = (TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS)
        if ref.kind in by_layer and any(other.kind in by_layer for other in held):
            raise self.refuse(f"slot {slot} still holds {held[0]}")
        held.append(ref)
        nbytes = sum(aligned(other.nbytes(self.graph)) for other in held)
        if not _has_room(limits, slot, nbytes):
            raise self.refuse(f"{nbytes} bytes in slot {slot} of {limits}")

    def leave(self, device: int, ref: TensorRef, slot: int) -> None:
        """Take a tensor out of a slot."""
        self.held[device, ref.is_gradient_part, slot].remove(ref)


class StageTable:
    """What each staging buffer on the host holds: a part of a gradient, until it is added."""

    def __init__(self, schedule: Schedule, graph: LayerGraph, refuse: Refuse) -> None:
        self.devices = schedule.devices
        self.graph = graph
        self.refuse = refuse
        self.held: dict[tuple[int, int], TensorRef] = {}

    def enter(self, device: int, ref: TensorRef, stage: int) -> None:
        """Put a part into a staging buffer of a device.

        Raises:
            ScheduleError: if it has no place there.
        """
        limits = self.devices[device].stages
        nbytes = aligned(ref.nbytes(self.graph))
        if not _has_room(limits, stage, nbytes):
            raise self.refuse(f"{nbytes} bytes in stage {stage} of {limits}")
        if self.held.get((device, stage), ref) != ref:
            raise self.refuse(f"stage {stage} holds {self.held[device, stage]}, not yet added")
        self.held[device, stage] = ref

    def leave(self, key: tuple[int, int]) -> None:
        """Take the part out of a buffer."""
        del self.held[key]

    def of(self, ref: TensorRef) -> tuple[int, int]:
        """Return device and number of the buffer that holds a part.

        Raises:
            ScheduleError: if none does.
        """
        for key, part in self.held.items():
            if part == ref:
                return key
        raise self.refuse(f"{ref} is in no staging buffer")

    def parts(self) -> Iterable[TensorRef]:
        """Return the parts that were never added."""
        return self.held.values()


def _has_room(limits: Slots, number: int, nbytes: int) -> bool:
    return 0 <= number < limits.count and nbytes <= limits.nbytes
