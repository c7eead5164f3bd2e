"""The checker's first look: an instruction, or a device, that makes no sense by itself.

What passes here names streams, tensors, devices and samples that exist, so that the walk which
follows (`harmony.planner.check.contents`) can look all of them up.
"""

from __future__ import annotations

from collections.abc import Container

from harmony.core.layergraph import LayerGraph
from harmony.errors import ScheduleError
from harmony.planner.ir.issue import Position, program_name, refuse
from harmony.planner.ir.schedule import (
    DEVICE_STREAMS,
    HOST_STREAM,
    Instruction,
    Op,
    Schedule,
)
from harmony.planner.ir.tasks import Samples, Task, TensorKind, TensorRef

_STREAM = {
    Op.RUN: "compute",
    Op.ALLOC: "compute",
    Op.DROP: "compute",
    Op.SWAP_IN: "h2d",
    Op.SWAP_OUT: "d2h",
    Op.SEND: "p2p",
}
"""The one stream of a device that an instruction may be on; events may be on any."""

_BY_LAYER = frozenset(
    {
        TensorKind.WEIGHTS,
        TensorKind.WEIGHT_GRADIENTS,
        TensorKind.STATE,
        TensorKind.SAVED,
        TensorKind.PRODUCTS,
    }
)
_SHARED = frozenset({TensorKind.SHARED, TensorKind.SHARED_GRADIENTS})


def check_form(schedule: Schedule, graph: LayerGraph) -> dict[TensorRef, int]:
    """Check every device and instruction by itself; return the device of what is resident.

    Raises:
        ScheduleError: with what makes no sense.
    """
    if len(schedule.programs) != schedule.num_devices:
        count = len(schedule.programs)
        raise ScheduleError(f"{schedule.num_devices} devices, and programs for {count}")
    look = _Look(schedule, graph)
    resident = look.resident()
    look.kept()
    for number, (_, program) in enumerate(schedule.all_programs()):
        for index, step in enumerate(program):
            look.at(Position(number, index), step)
    return resident


class _Look:
    """Looks at one instruction or device."""

    def __init__(self, schedule: Schedule, graph: LayerGraph) -> None:
        self.schedule = schedule
        self.graph = graph
        # Most tensors are named many times.
        self.known: set[TensorRef] = set()

    def resident(self) -> dict[TensorRef, int]:
        """Return the device of what is resident."""
        found: dict[TensorRef, int] = {}
        for index, device in enumerate(self.schedule.devices):
            for ref in device.resident:
                if ref.is_value or not self._exists(ref):
                    name = program_name(self.schedule, index)
                    raise ScheduleError(f"{ref} cannot be resident on {name}")
                if ref in found:
                    raise ScheduleError(f"{ref} is resident on two devices, or twice on one")
                found[ref] = index
        return found

    def kept(self) -> None:
        """Look at what passes from a schedule of FORWARDs to one of BACKWARDs on a device."""
        seen: set[TensorRef] = set()
        for index, device in enumerate(self.schedule.devices):
            for ref in (*device.left, *device.found):
                if not ref.is_kept or not self._exists(ref) or ref in seen:
                    name = program_name(self.schedule, index)
                    raise ScheduleError(f"{ref} cannot be left or found on {name}")
                seen.add(ref)

    def at(self, place: Position, step: Instruction) -> None:
        """Look at the instruction of a place."""
        on_host = place.program == self.schedule.num_devices
        what, event = step.op.value, step.op in (Op.RECORD, Op.WAIT)
        operand = step.event if event else step.task if step.op is Op.RUN else step.ref
        if operand is None:
            raise refuse(self.schedule, place, f"{what} does not say of what")
        if step.stream not in _streams(step.op, on_host):
            raise refuse(self.schedule, place, f"{what} cannot be on stream {step.stream!r} here")
        unknown = self._unknown(step)
        if unknown is not None:
            raise refuse(self.schedule, place, f"there is no {unknown} in this step")
        if step.op is Op.SEND and not self._is_other_device(step.peer, place.program):
            raise refuse(self.schedule, place, "a Send needs another device")
        if step.over is not None and not self._can_lie_over(step):
            why = "only a value lies over another one of its kind, or what is kept over such"
            raise refuse(self.schedule, place, why)
        if step.ref is None:
            return
        if step.op is Op.ALLOC and step.ref.is_value != (step.slot is None):
            why = "weights and gradients live in slots, values do not"
            raise refuse(self.schedule, place, why)
        staged = step.ref.is_gradient_part and step.ref.part > 0
        if step.op is Op.SWAP_OUT and staged != (step.slot is not None):
            why = "parts of a gradient but part 0, and only those, go to a stage"
            raise refuse(self.schedule, place, why)

    def _can_lie_over(self, step: Instruction) -> bool:
        ref, over = step.ref, step.over
        if step.op is not Op.SWAP_OUT or ref is None or over is None or not self._exists(over):
            return False
        if ref.is_kept and over.is_kept:
            return True
        return ref.is_value and (ref.kind, ref.first) == (over.kind, over.first)

    def _is_other_device(self, peer: int | None, number: int) -> bool:
        return peer is not None and 0 <= peer < self.schedule.num_devices and peer != number

    def _unknown(self, step: Instruction) -> TensorRef | Task | None:
        """What an instruction names and the step does not have."""
        refs = (step.ref,) if step.ref is not None else (*step.reads, *step.writes)
        for ref in refs:
            if ref not in self.known:
                if not self._exists(ref):
                    return ref
                self.known.add(ref)
        task = step.task
        if task is None:
            return None
        if task.addend is not None:  # a shared parameter's number says nothing of layers
            return None if self._exists(task.addend) else task
        pack = self._has_layers(task.pack.first, task.pack.last)
        return None if pack and self._has_samples(task.samples) else task

    def _exists(self, ref: TensorRef) -> bool:
        if ref.kind in _BY_LAYER:
            there = self._has_layers(ref.first, ref.last)
        else:
            names = self.graph.shared if ref.kind in _SHARED else self.graph.values
            there = 0 <= ref.first < len(names)
        return there and self._has_samples(ref.samples) and ref.part >= 0

    def _has_layers(self, first: int, last: int) -> bool:
        return 0 <= first < last <= self.graph.num_layers

    def _has_samples(self, samples: Samples | None) -> bool:
        return samples is None or 0 <= samples[0] < samples[1] <= self.schedule.minibatch


def _streams(op: Op, on_host: bool) -> Container[str]:
    """The streams that an instruction may be on."""
    is_event = op in (Op.RECORD, Op.WAIT)
    if on_host:
        return (HOST_STREAM,) if is_event or op is Op.RUN else ()
    return DEVICE_STREAMS if is_event else (_STREAM[op],)
