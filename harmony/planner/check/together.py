"""Checks that a schedule of FORWARDs and one of BACKWARDs go together.

Each is checked by itself (`harmony.planner.check.verify`); here is what the one relies on of the
other, in a loop of one's own: the same slots, and what passes from FORWARD to BACKWARD.
"""

from __future__ import annotations

from harmony.errors import ScheduleError
from harmony.planner.ir.issue import program_name
from harmony.planner.ir.schedule import Op, Schedule
from harmony.planner.ir.tasks import TensorRef


def check_together(forward: Schedule, backward: Schedule) -> None:
    """Refuse a BACKWARD that finds something else than the FORWARD before it leaves.

    Raises:
        ScheduleError: naming the tensor, or the device whose slots differ.
    """
    for index, device in enumerate(backward.devices):
        name = program_name(backward, index)
        before = forward.devices[index] if index < forward.num_devices else None
        left = () if before is None else before.left
        for ref in device.found:
            if ref not in left:
                raise ScheduleError(f"{ref} is to be found on {name}: no FORWARD leaves it there")
        if before is None or not device.found:
            continue
        slots = (device.weight_slots, device.gradient_slots)
        if slots != (before.weight_slots, before.gradient_slots):
            # What a FORWARD has left belongs to the parameters in its slots.
            raise ScheduleError(f"the slots of {name} are others than those of the FORWARDs")
    for ref in sorted(_kept(backward, Op.SWAP_IN) - _kept(forward, Op.SWAP_OUT), key=str):
        raise ScheduleError(f"{ref} comes from the host: no FORWARD leaves it there")


def _kept(schedule: Schedule, op: Op) -> set[TensorRef]:
    """What of that which FORWARDs leave for BACKWARDs is copied by a kind of instruction."""
    steps = (step for program in schedule.programs for step in program)
    return {step.ref for step in steps if step.op is op and step.ref and step.ref.is_kept}
