"""Runs a schedule on symbols, in an order drawn at random: what the checker accepts must be right.

Threads issue, streams run, copies and Runs take time: each starts, and ends some time later.
Until it has ended, what it writes is torn; what it reads must be the same at both moments. Every
Run must read what a plain loop over the tasks gives it, and the step must leave what that leaves.
It shares nothing with the checker (`harmony.planner.check.verify`) but the schedule.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Phase, Task, TaskGraph, TensorKind, TensorRef

Place = Hashable
"""Where something is: a slot, a buffer, a place on the host."""

TORN = "torn"
_BY_LAYER = (TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS)


class WrongStepError(Exception):
    """The step does not compute what it should."""


def _made(task: Task, ref: TensorRef, read: Iterable[object]) -> tuple[object, ...]:
    """What a task writes: one symbol a layer for weights, else one."""
    layers = range(ref.first, ref.last) if ref.kind is TensorKind.WEIGHTS else (ref.first,)
    inputs = hash(tuple(read))
    return tuple((str(task), ref.kind.value, layer, inputs) for layer in layers)


def _start(ref: TensorRef) -> tuple[object, ...]:
    """What the step finds."""
    if ref.is_value:
        return (("start", ref.kind.value, ref.first),)
    return tuple(("start", ref.kind.value, layer) for layer in range(ref.first, ref.last))


class Plain:
    """The tasks of a step one after the other."""

    def __init__(self, tasks: TaskGraph) -> None:
        self.read: dict[Task, list[tuple[object, ...]]] = {}
        self.final: dict[TensorRef, tuple[object, ...]] = {}
        self.layers: dict[int, object] = {}
        for task in tasks.tasks:
            self.read[task] = [self._of(ref) for ref in tasks.reads[task]]
            for ref in tasks.writes[task]:
                self.final[ref] = made = _made(task, ref, self.read[task])
                if ref.kind is TensorKind.WEIGHTS:
                    self.layers.update(zip(range(ref.first, ref.last), made, strict=True))

    def _of(self, ref: TensorRef) -> tuple[object, ...]:
        if ref in self.final:
            return self.final[ref]
        if ref.kind is TensorKind.WEIGHTS:  # packs of updates and of FORWARD differ
            layers = range(ref.first, ref.last)
            return tuple(self.layers.get(i, s) for i, s in zip(layers, _start(ref), strict=True))
        wholes = [m for m in self.final if ref.is_value and _is_part(ref, m)]
        return self.final[wholes[0]] if wholes else _start(ref)


def _is_part(part: TensorRef, whole: TensorRef) -> bool:
    if (part.kind, part.first, part.last) != (whole.kind, whole.first, whole.last):
        return False
    a, b = part.samples, whole.samples
    return a is not None and b is not None and b[0] <= a[0] and a[1] <= b[1]


class _Haste(dict[object, float]):
    """How often each thread and stream comes to do something, beside the others."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def __missing__(self, key: object) -> float:
        haste = self[key] = 30.0 ** self.draw.uniform(-1.0, 1.0)
        return haste


@dataclass
class _Job:
    """An issued instruction, with the places that it was bound to as it was issued."""

    step: Instruction
    reads: tuple[tuple[Place, ...], ...] = ()
    writes: tuple[tuple[Place, ...], ...] = ()
    read: tuple[object, ...] | None = None


class Interpreter:
    """One run of a schedule."""

    def __init__(self, schedule: Schedule, tasks: TaskGraph, plain: Plain, seed: int) -> None:
        self.schedule = schedule
        self.tasks = tasks
        self.plain = plain
        self.random = random.Random(seed)
        # Some threads and streams are far slower than others: races show.
        self.haste = _Haste(self.random)
        self.programs = [program for _, program in schedule.all_programs()]
        self.next = [0] * len(self.programs)
        self.queues: dict[tuple[int, str], deque[_Job]] = defaultdict(deque)
        self.issued: set[int] = set()
        self.over: set[int] = set()
        self.memory: dict[Place, object] = {}
        self.where: dict[tuple[int, TensorRef], Place] = {}
        self.freed: set[Place] = set()
        self.buffers = 0
        self.on_host: list[TensorRef] = []
        self.stages: dict[TensorRef, Place] = {}
        for number, device in enumerate(schedule.devices):
            for ref in device.resident:
                place = self.where[number, ref] = ("resident", ref)
                self.memory[place] = TORN if ref.is_gradient_part else _start(ref)
            for ref in device.found:
                place = self.where[number, ref] = self._buffer()
                self.memory[place] = _start(ref)

    def run(self) -> None:
        """Run the step.

        Raises:
            WrongStepError: if it computes something else than the plain loop, or never ends.
        """
        while True:
            moves = [(number, None) for number in range(len(self.programs)) if self._can(number)]
            streams = [key for key, queue in self.queues.items() if self._ready(queue)]
            choices = [*moves, *((-1, key) for key in streams)]
            if not choices:
                break
            weights = [self.haste[move] for move in choices]
            number, key = self.random.choices(choices, weights)[0]
            if key is None:
                self._issue(number)
            else:
                self._advance(key)
        if any(n < len(p) for n, p in zip(self.next, self.programs, strict=True)):
            raise WrongStepError("it never ends")
        if any(self.queues.values()):
            raise WrongStepError("a stream never ends")
        self._check_end()

    # -- threads ----------------------------------------------------------------------------

    def _can(self, number: int) -> bool:
        if self.next[number] >= len(self.programs[number]):
            return False
        step = self.programs[number][self.next[number]]
        if number == self.schedule.num_devices and self.queues[number, step.stream]:
            return False  # the host's thread does its work itself
        return step.op is not Op.WAIT or step.event in self.issued

    def _issue(self, number: int) -> None:
        step = self.programs[number][self.next[number]]
        self.next[number] += 1
        job = _Job(step)
        if step.op is Op.RECORD:
            assert step.event is not None
            self.issued.add(step.event)
        elif step.op is Op.RUN:
            job.reads = tuple(self._place(number, ref) for ref in step.reads)
            job.writes = tuple(self._out(number, ref) for ref in step.writes)
        elif step.ref is not None:
            self._bind(number, step, step.ref, job)
        self.queues[number, step.stream].append(job)

    def _bind(self, number: int, step: Instruction, ref: TensorRef, job: _Job) -> None:
        if step.op is Op.ALLOC:
            if step.slot is None:
                self.where[number, ref] = self._buffer()
            else:
                own = "layers" if ref.kind in _BY_LAYER else ref
                slot = ("slot", number, ref.is_gradient_part, step.slot, own)
                self.where[number, ref] = slot
            job.writes = (self._place(number, ref),)
        elif step.op is Op.DROP:
            job.writes = (self._place(number, ref),)
            self.where.pop((number, ref))
        elif step.op is Op.SWAP_IN:
            job.reads, job.writes = (self._host(ref),), (self._place(number, ref),)
        elif step.op is Op.SWAP_OUT:
            job.reads = (self._place(number, ref),)
            if step.slot is not None:
                self.stages[ref] = ("stage", number, step.slot)
            elif ref not in self.on_host:
                self.on_host.append(ref)
            job.writes = (self._host(ref),)
        else:
            assert step.peer is not None
            job.reads = (self._place(number, ref),)
            job.writes = (self._place(step.peer, ref),)

    def _buffer(self) -> Place:
        self.buffers += 1
        return ("buffer", self.buffers)

    def _place(self, number: int, ref: TensorRef) -> tuple[Place, ...]:
        if number == self.schedule.num_devices:
            return self._host(ref)
        if (number, ref) not in self.where:
            raise WrongStepError(f"{ref} is not on gpu{number}")
        return (self.where[number, ref],)

    def _out(self, number: int, ref: TensorRef) -> tuple[Place, ...]:
        on_device = number < self.schedule.num_devices
        if on_device and (number, ref) not in self.where:
            if not ref.is_value:
                raise WrongStepError(f"{ref} is not on gpu{number}")
            self.where[number, ref] = self._buffer()
        return self._place(number, ref)

    def _host(self, ref: TensorRef) -> tuple[Place, ...]:
        if ref.kind is TensorKind.WEIGHTS:
            return tuple(("host", ref.kind, layer) for layer in range(ref.first, ref.last))
        if ref.part:
            return (self.stages.get(ref, ("no stage", ref)),)
        if ref.is_value and ref not in self.on_host:
            wholes = [whole for whole in self.on_host if _is_part(ref, whole)]
            return (("host", wholes[0]),) if wholes else (("given", ref),)
        return (("host", ref),)

    # -- streams ----------------------------------------------------------------------------

    def _ready(self, queue: deque[_Job]) -> bool:
        if not queue:
            return False
        step = queue[0].step
        return step.op is not Op.WAIT or step.event in self.over

    def _advance(self, key: tuple[int, str]) -> None:
        """Start the first job of a stream, or end it."""
        job = self.queues[key][0]
        step = job.step
        if step.op in (Op.RECORD, Op.WAIT):
            if step.op is Op.RECORD:
                assert step.event is not None
                self.over.add(step.event)
            self.queues[key].popleft()
            return
        now = tuple(self._load(places) for places in job.reads)
        if job.read is None:
            job.read = now
            for place in (place for places in job.writes for place in places):
                if place in self.freed:
                    raise WrongStepError(f"{step} writes to memory that was given back")
                self.memory[place] = TORN
            return
        self.queues[key].popleft()
        self._end(job, now)

    def _load(self, places: tuple[Place, ...]) -> object:
        found: list[object] = []
        for place in places:
            start: object = TORN
            if isinstance(place, tuple) and place[0] == "given":
                start = _start(place[1])
            elif isinstance(place, tuple) and place[0] == "host":
                by_layer = len(place) == 3
                start = (("start", place[1].value, place[2]),) if by_layer else _start(place[1])
            held = self.memory.get(place, start)
            found.extend(held if isinstance(held, tuple) else [held])
        return tuple(found)

    def _end(self, job: _Job, now: tuple[object, ...]) -> None:
        step = job.step
        if step.op in (Op.ALLOC, Op.DROP):
            if step.op is Op.DROP:
                self.freed.update(p for p in job.writes[0] if "buffer" in str(p))
            return
        if step.op is Op.RUN:
            assert step.task is not None and job.read is not None
            expected = tuple(self.plain.read.get(step.task, ()))
            # What it writes itself is torn by now; it was right when it began.
            if job.read != expected:
                raise WrongStepError(f"{step.task} reads {job.read}, not {expected}")
            kept = [i for i, p in enumerate(job.reads) if p not in job.writes]
            if any(now[i] != job.read[i] for i in kept):
                raise WrongStepError(f"something changes under {step.task}")
            for ref, places in zip(step.writes, job.writes, strict=True):
                self._store(places, _made(step.task, ref, job.read))
            return
        if now != job.read:
            raise WrongStepError(f"something changes under {step}")
        self._store(job.writes[0], now[0])

    def _store(self, places: tuple[Place, ...], content: object) -> None:
        assert isinstance(content, tuple)
        for index, place in enumerate(places):
            if place in self.freed:
                raise WrongStepError("something writes to memory that was given back")
            self.memory[place] = content if len(places) == 1 else (content[index],)

    # -- the end ----------------------------------------------------------------------------

    def _check_end(self) -> None:
        resident = {ref: n for n, d in enumerate(self.schedule.devices) for ref in d.resident}
        left = {ref: n for n, d in enumerate(self.schedule.devices) for ref in d.left}
        found = {ref: n for n, d in enumerate(self.schedule.devices) for ref in d.found}
        if any((number, ref) in self.where for ref, number in found.items()):
            raise WrongStepError("what was found there is still there")
        for ref, number in left.items():
            there = self.where.get((number, ref))
            if there is None or self._load((there,)) != self.plain.final[ref]:
                raise WrongStepError(f"{ref} is not left on its device")
        for ref, content in self.plain.final.items():
            if (
                self._stays(ref)
                and ref in resident
                and self._load((self.where[resident[ref], ref],)) != content
            ):
                raise WrongStepError(f"{ref} is not what it should be on its device")
            out = ref.is_kept and self.tasks.spec.phase is Phase.FORWARD and ref not in left
            if out and self._load(self._host(ref)) != content:
                raise WrongStepError(f"{ref} is not left on the host")
            if self._is_wanted(ref, resident) and self._load(self._host(ref)) != content:
                raise WrongStepError(f"{ref} is not what it should be on the host")

    def _stays(self, ref: TensorRef) -> bool:
        return ref.kind in (TensorKind.WEIGHTS, TensorKind.SHARED, TensorKind.STATE)

    def _is_wanted(self, ref: TensorRef, resident: Iterable[TensorRef]) -> bool:
        if ref.is_parameter:
            return True
        if ref.is_kept:
            return False
        if ref.is_gradient_part or ref.kind is TensorKind.STATE:
            return ref.part == 0 and ref not in resident
        value = self.tasks.layers.values[ref.first]
        if ref.kind is TensorKind.VALUE_GRADIENT:
            return value.producer < 0
        return (
            ref.kind is TensorKind.VALUE
            and value.is_output
            and (self.tasks.spec.phase is not Phase.BACKWARD)
        )


def runs_right(schedule: Schedule, tasks: TaskGraph, plain: Plain, seeds: Iterable[int]) -> str:
    """Run a schedule in several orders; return what went wrong, or nothing."""
    ran = [step.task for _, program in schedule.all_programs() for step in program if step.task]
    if sorted(map(str, ran)) != sorted(map(str, tasks.tasks)):
        return "it does not run every task once"
    for seed in seeds:
        try:
            Interpreter(schedule, tasks, plain, seed).run()
        except WrongStepError as error:
            return str(error)
    return ""
