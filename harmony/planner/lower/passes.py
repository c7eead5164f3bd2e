"""Lowers a task graph to a schedule, by small passes.

place    which device runs what, and one order that every program keeps
resident which weights stay on their device between steps, and are updated there
stays    how long each value stays on a device, how it comes and where it goes
slots    which slot holds the weights and gradients of each group of Runs
values   the copies and drops of values around each Run
events   Record and Wait for every ordering that the streams do not enforce
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harmony.core.machine import Machine
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import DeviceSpec, Schedule, Slots
from harmony.planner.ir.tasks import TaskGraph
from harmony.planner.lower.events import add_events
from harmony.planner.lower.place import Placement, place
from harmony.planner.lower.resident import Residents, find_resident
from harmony.planner.lower.slots import SlotWriter
from harmony.planner.lower.stays import Origin, Stay, find_stays
from harmony.planner.lower.steps import StepList
from harmony.planner.lower.values import ValueWriter

__all__ = ["Policy", "in_the_same_slots", "lower"]


def lower(tasks: TaskGraph, machine: Machine, policy: Policy | None = None) -> Schedule:
    """Return a schedule of the tasks on a machine.

    A step with one share of the minibatch is pipelined over all devices (Harmony-PP), a step
    with several gives each its own device (Harmony-DP), or its own ring of several. The schedule
    is not checked: see `verify`, which also says whether it fits.

    Raises:
        PlanError: if there are more shares than devices.
    """
    policy = policy or Policy()
    placement = place(tasks, machine, mirror=policy.mirror)
    spec = tasks.spec
    # Where the devices of a ring take turns, one may still read what another one would write over.
    alone = spec.rounds > 1 and placement.num_devices == 1
    steps = StepList(tasks if alone else None)
    resident = find_resident(placement, policy)
    slots = [
        SlotWriter(steps, placement, d, policy, resident.refs_on(d))
        for d in range(placement.num_devices)
    ]
    stays = find_stays(placement, policy)
    _write(placement, steps, slots, policy, resident, stays)
    *programs, host = add_events(steps.steps, placement.num_devices)
    devices = tuple(
        DeviceSpec(
            machine.devices[index].memory_nbytes,
            item.weight_slots,
            item.gradient_slots,
            item.stages.slots,
            resident.refs_on(index),
            tuple(s.ref for s in stays if s.lasts and s.device == index),
            tuple(s.ref for s in stays if s.origin is Origin.FOUND and s.device == index),
        )
        for index, item in enumerate(slots)
    )
    return Schedule(tasks.spec.minibatch, devices, tuple(map(tuple, programs)), tuple(host))


def in_the_same_slots(schedules: Sequence[Schedule]) -> list[Schedule]:
    """Return schedules that take turns on the devices, each with the largest slots of any.

    So one can follow the other without giving memory back, and what a forward has left on a
    device belongs to slots that are still there when its backward runs.
    """
    found = []
    for schedule in schedules:
        devices = tuple(
            replace(
                device,
                weight_slots=_largest([s.devices[index].weight_slots for s in there]),
                gradient_slots=_largest([s.devices[index].gradient_slots for s in there]),
            )
            for index, device in enumerate(schedule.devices)
            for there in [[s for s in schedules if index < s.num_devices]]
        )
        found.append(replace(schedule, devices=devices))
    return found


def _largest(slots: Sequence[Slots]) -> Slots:
    return Slots(max(s.count for s in slots), max(s.nbytes for s in slots))


def _write(
    placement: Placement,
    steps: StepList,
    slots: list[SlotWriter],
    policy: Policy,
    resident: Residents,
    stays: list[Stay],
) -> None:
    """Write all instructions but events, in the one order that every program keeps.

    Around each Run, in the order of its program::

        h2d     SwapIn W of this group, unless prefetched; Alloc of its gradients
        h2d     SwapIn X that a Run needs `lookahead` Runs from now
        h2d     SwapIn W of the next group, in the other slot (of what is updated late, Alloc only:
                SwapIn before the first Run of that group)
        compute Run
        d2h     SwapOut, p2p Send of what it made and others need
        compute Drop of values whose last use is over
        d2h     SwapOut dW; compute Drop W, after the last Run of a group
        compute Run U, d2h SwapOut W, of weights that stay on their device
    """
    values = ValueWriter(steps, stays, placement.num_devices, policy.lookahead)
    reads, writes = placement.tasks.reads, placement.tasks.writes
    for task in placement.order:
        device = placement.device.get(task)
        owner = resident.device_of(task)
        if owner is not None:
            steps.run(owner, task, reads[task], writes[task])
            for ref in writes[task]:
                if ref.is_parameter:
                    steps.swap_out(owner, ref)
            continue
        if device is None:
            steps.run_on_host(task, reads[task], writes[task])
            if task.addend is not None:
                owner, stage = steps.stage_of[task.addend]
                slots[owner].stages.free.append(stage)
            continue
        position = placement.position[task]
        slots[device].before(position)
        values.before(device)
        slots[device].arrive(position)
        slots[device].prefetch(position)
        steps.run(device, task, reads[task], writes[task])
        values.after(device)
        slots[device].after(position)
    for device in range(placement.num_devices):
        values.finish(device)
        slots[device].finish()
