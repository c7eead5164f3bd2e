"""Binds tasks to devices and puts them in one order that every program keeps.

Harmony-PP, "wrap-around": pack i of the sequence F0 .. Fk, B_last .. B_0 runs on GPU i mod N.
Harmony-DP: replica r runs on GPU r (PVLDB 15(11), 2022). E.g. N = 2, two FORWARD and
three BACKWARD packs, two microbatches, named by their first layers::

    gpu0  F0 F0    B4 B4    B0 B0
    gpu1     F2 F2    B2 B2

With fewer replicas than GPUs each replica has a ring of its own: replica r of R wraps around
GPUs r * (N // R) and up. *Mirrored*, BACKWARD of a pack runs where its FORWARD ran, so that what
the forward has left there (weights, activations) can be used::

    gpu0  F0 F0    B4 B4       B0 B0
    gpu1     F2 F2       B2 B2

The order comes from a list schedule that counts layers and samples instead of seconds. It is a
topological order of the tasks; since programs are cut out of it, and events only ever point
forward in it, no set of programs made from it can deadlock.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from harmony.core.machine import Machine
from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack, Phase, Task, TaskGraph, TaskKind

TaskGroup = tuple[TaskKind, Pack]
"""A group of tasks that share the weights on the device: FORWARD or BACKWARD of a pack."""

_EFFORT = {TaskKind.FORWARD: 1, TaskKind.BACKWARD: 3}


@dataclass(frozen=True)
class Placement:
    """Where and in which order the tasks run.

    Attributes:
        num_devices: how many devices have a program.
        device: of each FORWARD and BACKWARD task.
        turn: per stage its place in the sequence of the paper.
        position: of each FORWARD and BACKWARD task among those of its device.
        order: all tasks, in the order that every program keeps.
        runs: per device, its tasks in order.
        forward_device: where each FORWARD pack of a replica runs, in this step or before it.
    """

    tasks: TaskGraph
    num_devices: int
    device: dict[Task, int]
    turn: dict[TaskGroup, int]
    position: dict[Task, int]
    order: tuple[Task, ...]
    runs: tuple[tuple[Task, ...], ...]
    forward_device: dict[tuple[int, Pack], int]

    def is_next(self, earlier: Task, later: Task) -> bool:
        """Whether ``later`` belongs to the very next pack of the sequence."""
        return self.turn[later.kind, later.pack] == self.turn[earlier.kind, earlier.pack] + 1


def ring_size(num_devices: int, replicas: int, num_stages: int) -> int:
    """How many devices each replica wraps around; no more than it has packs to run.

    Raises:
        PlanError: if there are more replicas than devices.
    """
    if replicas > num_devices:
        raise PlanError(f"{replicas} replicas need as many devices; there are {num_devices}")
    return min(num_devices // replicas, max(1, num_stages))


def place(tasks: TaskGraph, machine: Machine, *, mirror: bool = False) -> Placement:
    """Bind every FORWARD and BACKWARD task to a device and order all tasks.

    Args:
        mirror: whether BACKWARD of a pack runs where its FORWARD ran, be it in a step before.

    Raises:
        PlanError: if there are more replicas than devices.
    """
    spec = tasks.spec
    replicas = len(spec.shares)
    turn: dict[TaskGroup, int] = {}
    for task in tasks.tasks:
        if task.samples is not None:
            turn.setdefault((task.kind, task.pack), len(turn))
    is_apart = spec.phase is Phase.BACKWARD
    forward_turn = {pack: number for number, pack in enumerate(spec.forward_packs)}
    ring = ring_size(machine.num_devices, replicas, len(turn))
    forward_ring = ring
    if is_apart and forward_turn:
        forward_ring = ring_size(machine.num_devices, replicas, len(forward_turn))
        ring = forward_ring if mirror else ring
    num_devices = replicas * ring

    def seat(task: Task) -> int:
        """Place in the ring of its replica."""
        forward = forward_turn.get(task.pack) if mirror and task.pack in forward_turn else None
        return (turn[task.kind, task.pack] if forward is None else forward) % ring

    device = {task: r * ring + seat(task) for task, r in tasks.replica_of.items()}
    runs: list[list[Task]] = [[] for _ in range(num_devices)]
    position = {}
    for task in tasks.tasks:
        if task in device:
            position[task] = len(runs[device[task]])
            runs[device[task]].append(task)
    order = _order(tasks, device)
    forward_device = {
        (replica, pack): replica * forward_ring + number % forward_ring
        for pack, number in forward_turn.items()
        for replica in range(replicas)
    }
    every = tuple(tuple(run) for run in runs)
    return Placement(tasks, num_devices, device, turn, position, order, every, forward_device)


def _order(tasks: TaskGraph, device: dict[Task, int]) -> tuple[Task, ...]:
    """Sort tasks by their start in a list schedule; host tasks start when they can."""
    start: dict[Task, int] = {}
    end: dict[Task, int] = {}
    free: dict[int, int] = defaultdict(int)
    for task in tasks.tasks:
        ready = max((end[before] for before in tasks.graph.predecessors(task)), default=0)
        if task in device:
            ready = max(ready, free[device[task]])
        start[task] = ready
        # At least 1, so that what depends on a task sorts after it.
        effort = _EFFORT.get(task.kind, 1) * (task.pack.last - task.pack.first)
        end[task] = ready + effort * max(1, task.num_samples)
        if task in device:
            free[device[task]] = end[task]
    canonical = {task: index for index, task in enumerate(tasks.tasks)}
    return tuple(sorted(tasks.tasks, key=lambda task: (start[task], canonical[task])))
