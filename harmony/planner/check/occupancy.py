"""What the slots and staging buffers of a schedule hold, and why a tensor has no place in one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from harmony.core.layergraph import LayerGraph
from harmony.core.units import aligned
from harmony.planner.ir.schedule import Schedule, Slots
from harmony.planner.ir.tasks import TensorKind, TensorRef


class SlotTable:
    """What each slot of each device holds."""

    def __init__(self, schedule: Schedule, graph: LayerGraph) -> None:
        self.devices = schedule.devices
        self.graph = graph
        self.held: dict[tuple[int, bool, int], list[TensorRef]] = defaultdict(list)

    def enter(self, device: int, ref: TensorRef, slot: int) -> str | None:
        """Put a tensor into a slot; return why it does not fit there."""
        spec, held = self.devices[device], self.held[device, ref.is_gradient_part, slot]
        limits = spec.gradient_slots if ref.is_gradient_part else spec.weight_slots
        by_layer = (TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS)
        if ref.kind in by_layer and any(other.kind in by_layer for other in held):
            return f"slot {slot} still holds {held[0]}"
        held.append(ref)
        return _overflow(limits, slot, sum(aligned(other.nbytes(self.graph)) for other in held))

    def leave(self, device: int, ref: TensorRef, slot: int) -> None:
        """Take a tensor out of a slot."""
        self.held[device, ref.is_gradient_part, slot].remove(ref)


class StageTable:
    """What each staging buffer on the host holds: a part of a gradient, until it is added."""

    def __init__(self, schedule: Schedule, graph: LayerGraph) -> None:
        self.devices = schedule.devices
        self.graph = graph
        self.held: dict[tuple[int, int], TensorRef] = {}

    def enter(self, device: int, ref: TensorRef, stage: int) -> str | None:
        """Put a part into a staging buffer of a device; return why it has no place there."""
        limits = self.devices[device].stages
        why = _overflow(limits, stage, aligned(ref.nbytes(self.graph)))
        if why is None and (device, stage) in self.held:
            why = f"stage {stage} holds {self.held[device, stage]}, not yet added"
        if why is None:
            self.held[device, stage] = ref
        return why

    def leave(self, key: tuple[int, int]) -> None:
        """Take the part out of a buffer."""
        del self.held[key]

    def of(self, ref: TensorRef) -> tuple[int, int] | None:
        """Return device and number of the buffer that holds a part, or None."""
        return next((key for key, part in self.held.items() if part == ref), None)

    def parts(self) -> Iterable[TensorRef]:
        """Return the parts that were never added."""
        return self.held.values()


def _overflow(limits: Slots, number: int, nbytes: int) -> str | None:
    if number >= limits.count or nbytes > limits.nbytes:
        return f"{nbytes} bytes in number {number} of {limits}"
    return None
