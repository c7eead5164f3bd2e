"""Finds how long each value stays on a device, how it gets there and where it goes.

A *stay* is one period in which a device holds one value. A value that the next pack needs on
another device goes there directly (p2p); one that a later pack needs goes through the host; one
that is needed again soon, or that ``boundary="keep"`` says to keep, simply stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from harmony.core.layergraph import MODEL_INPUT
from harmony.errors import PlanError
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.task_graph import covers, kept_values
from harmony.planner.ir.tasks import Phase, Task, TaskKind, TensorKind, TensorRef
from harmony.planner.lower.place import Placement


class Origin(Enum):
    """How a value gets onto a device."""

    MADE = "by a Run"
    HOST = "from the host"
    PEER = "from another device"
    FOUND = "there when the step begins"


@dataclass(eq=False)
class Stay:
    """One period of one value on one device.

    Attributes:
        source: for HOST the tensor on the host that covers it.
        sender: the stay it comes from, over the host or directly; None if the step began with
            it on the host.
        runs: positions of the Runs on the device that use it, ascending.
        written: position of the last Run that writes it, -1 if it only arrives.
        leaves: whether it goes to the host after it was written.
        targets: the stays it is sent to after it was written.
        lasts: whether it is still there when the step ends.
    """

    ref: TensorRef
    device: int
    origin: Origin
    runs: list[int]
    source: TensorRef | None = None
    sender: Stay | None = None
    written: int = -1
    leaves: bool = False
    targets: list[Stay] = field(default_factory=list)
    lasts: bool = False


def find_stays(placement: Placement, policy: Policy) -> list[Stay]:
    """Return all stays, in the order in which plain PyTorch would first use them."""
    return _Finder(placement, policy).find()


class _Finder:
    """Walks the tasks in the order of plain PyTorch and follows each value."""

    def __init__(self, placement: Placement, policy: Policy) -> None:
        self.placement = placement
        self.policy = policy
        self.graph = placement.tasks.layers
        self.stays: list[Stay] = []
        self.here: dict[tuple[int, TensorRef], Stay] = {}
        # Who wrote the newest version of a value, and the stay that holds it.
        self.newest: dict[TensorRef, tuple[Task, Stay]] = {}
        self.made: dict[int, list[TensorRef]] = {}
        self.offloaded = {(pack.first, pack.last) for pack in policy.offload}

    def find(self) -> list[Stay]:
        tasks = self.placement.tasks
        kept = kept_values(self.graph, tasks.spec)
        if tasks.spec.phase is Phase.BACKWARD:
            self._find_left()
        for task in tasks.tasks:
            if task not in self.placement.device:
                continue
            for ref in tasks.reads[task]:
                if ref.is_value:
                    self._read(task, ref)
            for ref in tasks.writes[task]:
                if ref.is_value:
                    self._write(task, ref)
                    if ref.kind is TensorKind.VALUE and ref.first in kept:
                        self.newest[ref][1].leaves = True
                    elif ref.is_kept and tasks.spec.phase is Phase.FORWARD:
                        stay = self.newest[ref][1]
                        stay.leaves = self._is_offloaded(ref)
                        stay.lasts = not stay.leaves
        for ref, (_, stay) in self.newest.items():
            # Complete only with the part of the last pack that adds to it.
            stay.leaves |= self._is_given(ref)
        return self.stays

    def _find_left(self) -> None:
        """Note what FORWARDs of a step before have left on the devices."""
        spec, placement = self.placement.tasks.spec, self.placement
        for pack in spec.kept:
            for replica in range(len(spec.shares)):
                device = placement.forward_device[replica, pack]
                for samples in spec.microbatches(replica, TaskKind.FORWARD):
                    ref = spec.kept_by(pack, replica, samples)
                    if ref is None or self._is_offloaded(ref):
                        continue
                    if device >= placement.num_devices:
                        raise _elsewhere(f"B{pack}", placement.num_devices - 1)
                    stay = self.here[device, ref] = Stay(ref, device, Origin.FOUND, [])
                    self.stays.append(stay)

    def _is_given(self, ref: TensorRef) -> bool:
        """Whether the caller gets it: the gradient of an input of the model."""
        is_gradient = ref.kind is TensorKind.VALUE_GRADIENT
        return is_gradient and self.graph.values[ref.first].producer == MODEL_INPUT

    def _read(self, task: Task, ref: TensorRef) -> None:
        device, position = self.placement.device[task], self.placement.position[task]
        stay = self.here.get((device, ref))
        is_apart = self.placement.tasks.spec.phase is Phase.BACKWARD
        if ref.is_kept and stay is None and not (is_apart and self._is_offloaded(ref)):
            raise _elsewhere(task, device)
        if stay is not None and self._still_here(stay, task, position):
            stay.runs.append(position)
            return
        newest = self.newest.get(ref)
        direct = newest is not None and self.placement.is_next(newest[0], task)
        if newest and direct and newest[1].device != device and self.policy.boundary != "host":
            arrival = Stay(ref, device, Origin.PEER, [position], sender=newest[1])
            newest[1].targets.append(arrival)
        else:
            arrival = self._from_host(ref, device, position)
        self.here[device, ref] = arrival
        self.stays.append(arrival)

    def _still_here(self, stay: Stay, task: Task, position: int) -> bool:
        """Whether the value has not left, or been outdated, since its last use here."""
        writer, newest = self.newest.get(stay.ref, (None, None))
        if stay.ref.is_kept and not self._is_offloaded(stay.ref):
            return True
        if writer is not None and newest is not stay:
            # A copy of a value is as good as the value, a copy of a growing gradient is not.
            if stay.ref.kind is TensorKind.VALUE_GRADIENT:
                return False
        elif self.policy.boundary == "keep" and writer and self.placement.is_next(writer, task):
            return True
        # If its fetch would be issued before its last use is over, nothing would be saved.
        return position - self.policy.lookahead <= stay.runs[-1]

    def _is_offloaded(self, ref: TensorRef) -> bool:
        return (ref.first, ref.last) in self.offloaded

    def _from_host(self, ref: TensorRef, device: int, position: int) -> Stay:
        source = ref
        if ref.kind is TensorKind.VALUE and self.graph.values[ref.first].producer != MODEL_INPUT:
            made = (m for m in self.made.get(ref.first, ()) if covers(m, ref))
            source = ref if ref in self.newest else next(made, ref)
        sender = self.newest[source][1] if source in self.newest else None
        if sender is not None:
            sender.leaves = True
        return Stay(ref, device, Origin.HOST, [position], source=source, sender=sender)

    def _write(self, task: Task, ref: TensorRef) -> None:
        device, position = self.placement.device[task], self.placement.position[task]
        if ref in self.placement.tasks.reads[task]:
            stay = self.here[device, ref]
        else:
            stay = Stay(ref, device, Origin.MADE, [position])
            self.here[device, ref] = stay
            self.stays.append(stay)
            self.made.setdefault(ref.first, []).append(ref)
        stay.written = position
        self.newest[ref] = (task, stay)


def _elsewhere(task: object, device: int) -> PlanError:
    return PlanError(
        f"{task} runs on gpu{device}, but what its FORWARD left for it is on another"
        " device. Use Policy(mirror=True), or leave the pack out of saved= and products="
    )
