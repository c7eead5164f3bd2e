"""The original's event-driven estimate of a step, without and with prefetch across tasks.

Six queues a GPU (copies in, copies out, compute, receive, send, CPU); an event starts when its
inputs and the event before it in its queue have ended. Every GPU in use has its fixed share of the
link to the host. The rules below were worked out from the reference data; they give the original's
times for all 44 of its schedules to the last digit recorded, with and without prefetch.

Without prefetch a GPU does one thing at a time: weights in, then per microbatch its input in, the
stash of that input out, forward, what is stashed inside of the pack out, the next microbatch; the
gradient of the outputs comes in after the recompute. Only sends, and outputs that go to the host
to be regrouped (U_F != U_B), run beside it. With prefetch an input comes in while the microbatch
before it computes; the next task's first inputs while the last microbatch does, its weights
afterwards; copies out hold nothing back but what needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from harmony.planner.ir.tasks import TaskKind
from harmony.planner.predict.flows import Activities, Resource, Times
from research.original.four_tuple import FourTuple, PackTask, covering
from research.original.profile import PaperProfile
from research.original.traffic import Traffic

Lane = tuple[int, str]
H = TypeVar("H")


@dataclass(frozen=True)
class Server:
    """The machine of the original's estimator: bytes per second, seconds.

    Attributes:
        swap_bytes_per_s: host link per direction, shared statically by the GPUs in use.
        peer_bytes_per_s: between two GPUs.
        message_bytes_per_s: host memory, shared likewise, for what another GPU's side stashed.
        deletion_s: on Compute, per FORWARD or BACKWARD task.
    """

    swap_bytes_per_s: float = 11.5 * 2**30
    peer_bytes_per_s: float = 8.2 * 2**30
    message_bytes_per_s: float = 16.0 * 2**30
    deletion_s: float = 0.04

    def seconds_per_unit(self, num_gpus: int) -> dict[str, float]:
        """What a byte (of ``run`` a second) of each kind of event takes with these GPUs in use."""
        swap = num_gpus / self.swap_bytes_per_s
        peer = 1.0 / self.peer_bytes_per_s
        host = num_gpus / self.message_bytes_per_s
        kinds = {"W_h2d": swap, "dW_d2h": swap, "X_h2d": swap, "X_d2h": swap}
        return {**kinds, "p2p": peer, "ARD": peer, "message": host, "run": 1.0}


SERVER = Server()


class Sink(Protocol[H]):
    """Takes the events of a step, each after those that it names."""

    def add(self, lanes: Sequence[Lane], after: Sequence[H], kind: str, amount: float) -> H:
        """Put an event into queues; return what later ones name it by."""


class Clock:
    """Times events at once: an event's name is when it ends. The fast way."""

    def __init__(self, seconds_per_unit: dict[str, float]) -> None:
        self.scale = seconds_per_unit
        self.free: dict[Lane, float] = {}

    def add(
        self, lanes: Sequence[Lane], after: Sequence[float], kind: str, amount: float
    ) -> float:
        """When an event ends."""
        free = self.free
        at = max(after, default=0.0)
        for lane in lanes:
            before = free.get(lane, 0.0)
            if before > at:
                at = before
        end = at + amount * self.scale[kind]
        for lane in lanes:
            free[lane] = end
        return end


class Events:
    """Keeps events as activities with their bytes, for `flows` to run and to be added up."""

    def __init__(self, server: Server, num_gpus: int) -> None:
        swap = Resource(server.swap_bytes_per_s, num_gpus)
        peer = Resource(server.peer_bytes_per_s)
        host = Resource(server.message_bytes_per_s, num_gpus)
        kinds = {"W_h2d": swap, "dW_d2h": swap, "X_h2d": swap, "X_d2h": swap}
        self.resources = {**kinds, "p2p": peer, "ARD": peer, "message": host}
        self.activities = Activities()
        self.nbytes = dict.fromkeys(self.resources, 0.0)

    def add(self, lanes: Sequence[Lane], after: Sequence[int], kind: str, amount: float) -> int:
        """Keep an event; return its number."""
        if kind == "run":
            return self.activities.add(tuple(lanes), after, seconds=amount)
        self.nbytes[kind] += amount
        return self.activities.add(tuple(lanes), after, units=amount, resources=(kind,))

    def run(self) -> Times:
        """Start and end of all events."""
        return self.activities.run(self.resources, "static")


def estimate_s(
    profile: PaperProfile, plan: FourTuple, *, prefetch: bool, server: Server = SERVER
) -> float:
    """Seconds of a step by the original's model.

    Raises:
        PlanError: if the plan does not cover the model, or a microbatch size was not measured.
    """
    plan.check(profile.num_layers)
    clock = Clock(server.seconds_per_unit(plan.gpus_in_use))
    Step(profile, plan, clock, server, prefetch).walk()
    return max(clock.free.values())


def estimate_events(
    profile: PaperProfile, plan: FourTuple, *, prefetch: bool, server: Server = SERVER
) -> tuple[Times, Traffic]:
    """Times of all events of a step by the original's model, and the bytes that they move.

    Raises:
        PlanError: if the plan does not cover the model, or a microbatch size was not measured.
    """
    plan.check(profile.num_layers)
    events = Events(server, plan.gpus_in_use)
    Step(profile, plan, events, server, prefetch).walk()
    copies = plan.num_gpus if plan.simulates_one else 1
    moved = {kind: round(copies * nbytes) for kind, nbytes in events.nbytes.items()}
    traffic = Traffic(
        moved["W_h2d"],
        moved["dW_d2h"],
        moved["X_h2d"],
        moved["X_d2h"],
        moved["p2p"],
        moved["ARD"],
        moved["dW_d2h"] // copies,
    )
    return events.run(), traffic


@dataclass
class _Turn(Generic[H]):
    """A task while its events are given out.

    Attributes:
        weights_after, inputs_after: what its weights, and its next microbatch's inputs, wait for.
        weights: when its weights are there, once that is known.
        early: whether its first inputs come in before its weights.
        ends: what the task's end waits for.
        started, computed: its last microbatch's computation.
    """

    task: PackTask
    follower: PackTask | None
    weights_after: list[H]
    inputs_after: list[H]
    early: bool
    weights: list[H] = field(default_factory=list)
    ends: list[H] = field(default_factory=list)
    started: list[H] = field(default_factory=list)
    computed: list[H] = field(default_factory=list)


@dataclass(frozen=True)
class _Handed(Generic[H]):
    """What a task leaves for the next: per microbatch what it waits for, and from which GPU.

    A sender of None means that it lies on the host.
    """

    sender: int | None
    ready: list[H]


class Step(Generic[H]):
    """One step's events, in the order of its tasks: nothing waits for a later task."""

    def __init__(
        self, profile: PaperProfile, plan: FourTuple, sink: Sink[H], server: Server, prefetch: bool
    ) -> None:
        self.profile = profile
        self.plan = plan
        self.add = sink.add
        self.deletion_s = server.deletion_s
        self.prefetch = prefetch
        self.backward_sizes = plan.microbatches(TaskKind.BACKWARD)
        forward_sizes = plan.microbatches(TaskKind.FORWARD)
        self.regrouped: list[list[int]] = [[] for _ in forward_sizes]
        for number, at in enumerate(covering(forward_sizes, self.backward_sizes)):
            self.regrouped[at].append(number)
        backward = [task for task in plan.tasks if task.kind is TaskKind.BACKWARD]
        # All but the first BACKWARD, whose input comes from the last FORWARD, read a stash.
        self.readers = {task.pack.first: task.gpu for task in backward[1:]}
        self.stashed: dict[int, list[H]] = {layer: [] for layer in self.readers}
        self.handed: _Handed[H] = _Handed(None, [])
        self.done: dict[int, _Turn[H]] = {}

    def walk(self) -> None:
        """Give all events to the sink."""
        tasks = self.plan.tasks
        for task, follower in zip(tasks, (*tasks[1:], None), strict=True):
            turn = self._turn(task, follower)
            sizes = self.plan.microbatches(task.kind)
            handed, self.handed = self.handed, self._hands_on(turn)
            run = self._forward if task.kind is TaskKind.FORWARD else self._backward
            for number, size in enumerate(sizes):
                run(turn, number, size, handed)
            self._finish(turn)
            self.done[task.gpu] = turn

    def _turn(self, task: PackTask, follower: PackTask | None) -> _Turn[H]:
        before = self.done.get(task.gpu)
        if before is None:
            turn = _Turn[H](task, follower, [], [], early=False)
        elif not self.prefetch:
            turn = _Turn(task, follower, before.ends, [], early=False)
        else:
            # A FORWARD of one microbatch gets its input only after its predecessor's end: its
            # weights need not wait for that.
            is_forward = task.kind is TaskKind.FORWARD
            early = not (is_forward and len(self.plan.microbatches(task.kind)) == 1)
            inputs_after = before.started if early else before.computed
            turn = _Turn(task, follower, before.computed, inputs_after, early)
        if not turn.early:
            self._load(turn)
            if not self.prefetch:
                turn.inputs_after = turn.weights
        return turn

    def _load(self, turn: _Turn[H]) -> None:
        """Bring the task's weights in."""
        lanes = [(turn.task.gpu, "in")]
        turn.weights = [self.add(lanes, turn.weights_after, "W_h2d", self._weight_nbytes(turn))]

    def _weight_nbytes(self, turn: _Turn[H]) -> int:
        moved, pack = self.profile.moved_nbytes, turn.task.pack
        return moved[pack.last] - moved[pack.first]

    def _hands_on(self, turn: _Turn[H]) -> _Handed[H]:
        """How the task's results get to the next task."""
        regroups = (
            self.plan.converts
            and turn.task.kind is TaskKind.FORWARD
            and turn.follower is not None
            and turn.follower.kind is TaskKind.BACKWARD
        )
        is_sent = not self.plan.simulates_one and not regroups
        return _Handed(turn.task.gpu if is_sent else None, [])

    def _value(
        self, turn: _Turn[H], layer: int, size: int, source: _Handed[H] | None, number: int
    ) -> H:
        """The input of a layer, or its gradient, comes in for a microbatch."""
        after, gpu = list(turn.inputs_after), turn.task.gpu
        lanes, kind = [(gpu, "in")], "X_h2d"
        if source is not None:
            after.append(source.ready[number])
            if source.sender is not None:
                # A rendezvous: sender and receiver are both busy with it.
                lanes, kind = [(source.sender, "send"), (gpu, "receive")], "p2p"
        return self.add(lanes, after, kind, size * self.profile.input_nbytes[layer])

    def _out(self, turn: _Turn[H], layer: int, size: int, after: H) -> H:
        """The input of a layer, or its gradient, goes to the host."""
        lanes = [(turn.task.gpu, "out")]
        return self.add(lanes, [after], "X_d2h", size * self.profile.input_nbytes[layer])

    def _regroup(self, gpu: int, reader: int, layer: int, number: int, copied: H) -> list[H]:
        """BACKWARD microbatches that are complete on the host with a FORWARD microbatch."""
        if gpu == reader:
            return [copied for _ in self.regrouped[number]]
        nbytes = 2 * self.profile.input_nbytes[layer]
        sizes = [self.backward_sizes[other] for other in self.regrouped[number]]
        return [self.add([(gpu, "cpu")], [copied], "message", nbytes * size) for size in sizes]

    def _forward(self, turn: _Turn[H], number: int, size: int, handed: _Handed[H]) -> None:
        """One microbatch of a FORWARD."""
        gpu, pack = turn.task.gpu, turn.task.pack
        ready = self._value(turn, pack.first, size, handed if pack.first else None, number)
        if turn.early and not number:
            self._load(turn)
        if pack.first in self.readers:
            copied = self._stash(turn, pack.first, size, number, ready)
            ready = ready if self.prefetch else copied
        end = self._run(turn, [ready], size)
        held = end
        for layer in range(pack.first + 1, pack.last):
            if layer in self.readers:
                held = self._stash(turn, layer, size, number, end)
        if self.handed.sender is not None:
            self.handed.ready.append(end if self.prefetch else held)
        else:
            copied = self._out(turn, pack.last, size, end)
            follower = turn.follower
            if follower is not None and follower.kind is TaskKind.BACKWARD:
                ready_there = self._regroup(gpu, follower.gpu, pack.last, number, copied)
                self.handed.ready.extend(ready_there)
            else:
                self.handed.ready.append(copied)
            held = copied if self.plan.simulates_one else held
        self._next(turn, end, held)

    def _stash(self, turn: _Turn[H], layer: int, size: int, number: int, after: H) -> H:
        """Keep the input of a layer, where a BACKWARD pack begins, on its reader's host side."""
        copied = self._out(turn, layer, size, after)
        gpu, reader = turn.task.gpu, self.readers[layer]
        self.stashed[layer].extend(self._regroup(gpu, reader, layer, number, copied))
        return copied

    def _backward(self, turn: _Turn[H], number: int, size: int, handed: _Handed[H]) -> None:
        """One microbatch of a BACKWARD, its recompute included."""
        pack = turn.task.pack
        is_first = pack.last == self.profile.num_layers
        stash = _Handed(None, self.stashed[pack.first]) if pack.first in self.readers else None
        source = (handed if pack.first else None) if is_first else stash
        ready = self._value(turn, pack.first, size, source, number)
        gradient = []
        if self.prefetch and not is_first:
            gradient = [self._value(turn, pack.last, size, handed, number)]
        if turn.early and not number:
            self._load(turn)
        end = self._run(turn, [ready], size)
        if not self.prefetch and not is_first:
            turn.inputs_after = [end]
            gradient = [self._value(turn, pack.last, size, handed, number)]
        sized = self.profile.sized(size)
        seconds = sized.backward_s[pack.last] - sized.backward_s[pack.first]
        end = held = self.add([(turn.task.gpu, "compute")], [end, *gradient], "run", seconds)
        if pack.first and self.handed.sender is None:
            held = self._out(turn, pack.first, size, end)
        self.handed.ready.append(held)
        self._next(turn, end, held)

    def _run(self, turn: _Turn[H], after: list[H], size: int) -> H:
        """The forward of a microbatch, in a BACKWARD the recompute."""
        lanes, pack = [(turn.task.gpu, "compute")], turn.task.pack
        is_forward = turn.task.kind is TaskKind.FORWARD
        sums = self.profile.sized(size, backward=not is_forward).forward_s
        after = [*after, *turn.weights]
        if self.prefetch:
            after = turn.started = [self.add(lanes, after, "run", 0.0)]
        return self.add(lanes, after, "run", sums[pack.last] - sums[pack.first])

    def _next(self, turn: _Turn[H], computed: H, held: H) -> None:
        """What the next microbatch, or the end of the task, waits for."""
        turn.computed = [computed]
        turn.inputs_after = turn.started if self.prefetch else [held]
        turn.ends = turn.computed if self.prefetch else [held]

    def _finish(self, turn: _Turn[H]) -> None:
        """Gradients, update, deletion."""
        gpu, pack = turn.task.gpu, turn.task.pack
        if turn.task.kind is TaskKind.BACKWARD:
            nbytes, num_gpus = self._weight_nbytes(turn), self.plan.num_gpus
            if self.plan.simulates_one and num_gpus > 1:
                reduced = 2 * (num_gpus - 1) / num_gpus * nbytes
                turn.ends = [self.add([(gpu, "compute")], turn.ends, "ARD", reduced)]
            turn.ends = [self.add([(gpu, "out")], turn.ends, "dW_d2h", nbytes)]
            updated = self.profile.updated_s
            self.add([(gpu, "cpu")], turn.ends, "run", updated[pack.last] - updated[pack.first])
        turn.ends = [self.add([(gpu, "compute")], turn.ends, "run", self.deletion_s)]
