"""Follows what every memory of a schedule holds, and refuses what must not be read or lost.

What a memory holds is told by the task that wrote it last; ``START`` is what the step found. A
Run must read what plain PyTorch would: the order of the tasks there says who that wrote.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from harmony.core.layergraph import MODEL_INPUT, LayerGraph
from harmony.errors import ScheduleError
from harmony.planner.check.clocks import Clocks
from harmony.planner.check.kept import Brought
from harmony.planner.check.occupancy import SlotTable, StageTable
from harmony.planner.ir.issue import Position, program_name, refuse
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Phase, Task, TaskKind, TensorKind, TensorRef

Cell = Hashable
Access = tuple[int, int]
START = "the start of the step"
NOTHING = "nothing"
Author = Task | str | tuple[Task | str, ...]
"""Of weights that late updates of several packs have written: one a layer."""


@dataclass(slots=True)
class _Memory:
    """Some memory: who wrote what it holds, and the accesses that later ones may race with."""

    cell: Cell
    author: Author = NOTHING
    alive: bool = False
    slot: int | None = None
    written: tuple[Access, Position] | None = None
    read: list[tuple[Access, Position]] = field(default_factory=list)


class _Memories(dict[Cell, _Memory]):
    """Every memory that was ever looked at."""

    def __missing__(self, cell: Cell) -> _Memory:
        memory = self[cell] = _Memory(cell)
        return memory


class Contents:
    """The memories of one walk through a schedule."""

    def __init__(
        self,
        schedule: Schedule,
        graph: LayerGraph,
        clocks: Clocks,
        resident: dict[TensorRef, int],
        given: Container[Brought],
    ) -> None:
        self.schedule = schedule
        self.graph = graph
        self.clocks = clocks
        self.resident = resident
        self.given = given
        self.memories = _Memories()
        self.slots = SlotTable(schedule, graph, self._refuse)
        self.stages = StageTable(schedule, graph, self._refuse)
        self.copies: dict[tuple[TensorKind, int], list[TensorRef]] = defaultdict(list)
        self.moved: dict[TensorRef, TensorRef] = {}
        self.at = Position(0, 0)
        self.authors = _expected_authors(schedule)
        for ref, index in self.resident.items():
            memory = self.memories[index, ref]
            memory.author = NOTHING if ref.is_gradient_part else START
            memory.alive = True
        self.left = {ref: i for i, device in enumerate(schedule.devices) for ref in device.left}
        self.found = {ref: i for i, device in enumerate(schedule.devices) for ref in device.found}
        for ref, index in self.found.items():
            self.memories[index, ref].author = START
            self.memories[index, ref].alive = True

    def do(self, at: Position, step: Instruction) -> None:
        """Follow one instruction."""
        self.at = at
        if step.op is Op.RUN:
            self._run(step)
            return
        ref = step.ref
        assert ref is not None  # `check_form` has seen to that
        if step.op is Op.ALLOC:
            self._alloc(ref, step.slot)
        elif step.op is Op.DROP:
            self._drop(ref)
        elif step.op is Op.SWAP_IN:
            self._swap_in(ref)
        elif step.op is Op.SWAP_OUT:
            self._swap_out(ref, step.slot, step.over)
        elif step.peer is not None:
            self._send(ref, step.peer)

    def finish(self, kept: frozenset[int], phase: Phase) -> None:
        """Check what the step leaves behind.

        Raises:
            ScheduleError: if a device still holds something, if a gradient part was never added,
                if a value in ``kept``, or a gradient that is asked for, is not on the host, or
                if what stays on a device is not what the next step must find there.
        """
        for cell, memory in self.memories.items():
            is_resident = isinstance(cell, tuple) and self.resident.get(cell[1]) == cell[0]
            if memory.alive and isinstance(cell, tuple) and self.found.get(cell[1]) == cell[0]:
                raise ScheduleError(f"{_name(cell)}, found there, is never dropped")
            is_left = isinstance(cell, tuple) and self.left.get(cell[1]) == cell[0]
            if memory.alive and memory.written is not None and not (is_resident or is_left):
                raise refuse(self.schedule, memory.written[1], f"{_name(cell)} is never dropped")
        for part in self.stages.parts():
            raise ScheduleError(f"{part} is swapped out and never added")
        if (self.left and phase is not Phase.FORWARD) or (
            self.found and phase is not Phase.BACKWARD
        ):
            raise ScheduleError(f"nothing is left or found on a device in a step to {phase.value}")
        for ref, index in self.left.items():
            there = self.memories[index, ref]
            if not there.alive or there.author != self.authors.final.get(ref):
                device = program_name(self.schedule, index)
                raise ScheduleError(f"{ref} is to be left on {device}, and is not there")
        for ref, author in self.authors.final.items():
            asked_for: list[_Memory] = []
            if ref.is_parameter and ref in self.resident:
                # Anybody may read parameters on the host once the step is over.
                asked_for = self._on_host(ref)
            elif self._is_asked_for(ref, kept, phase):
                asked_for = [self.memories["host", self.moved.get(ref, ref)]]
            if any(memory.author != author for memory in asked_for):
                raise ScheduleError(f"{ref}, made by {author}, never reaches the host")
            for stale in self._stale(ref, author):
                device = program_name(self.schedule, self.resident[stale])
                raise ScheduleError(f"{ref} is made by {author}, {stale} on {device} is not")

    def _is_asked_for(self, ref: TensorRef, kept: frozenset[int], phase: Phase) -> bool:
        """Whether a tensor that the step makes must be on the host when it ends."""
        if ref.is_gradient_part:
            # An update on the device uses up the gradient there.
            return ref.part == 0 and (phase is not Phase.TRAIN or ref not in self.resident)
        if ref.is_kept:
            return phase is Phase.FORWARD and ref not in self.left
        if ref.kind is TensorKind.VALUE_GRADIENT:
            return self.graph.values[ref.first].producer == MODEL_INPUT
        return ref.kind is TensorKind.VALUE and ref.first in kept

    def _stale(self, ref: TensorRef, author: Author) -> Iterator[TensorRef]:
        """Weights or state that stay on a device and are not as ``author`` wrote them last."""
        if ref.is_value or ref.is_gradient_part:
            return
        for there, device in self.resident.items():
            # Layers may be resident in other packs than those in which they are updated.
            overlaps = there.kind is ref.kind and there.first < ref.last and ref.first < there.last
            if overlaps and self.memories[device, there].author != author:
                yield there

    # -- instructions -----------------------------------------------------------------------

    def _alloc(self, ref: TensorRef, slot: int | None) -> None:
        memory = self._device(ref)
        if memory.alive:
            raise self._refuse(f"{ref} is still on {self._here}")
        self._touch(memory, write=True)
        memory.alive, memory.author = True, NOTHING
        if slot is not None:
            memory.slot = slot
            self.slots.enter(self.at.program, ref, slot)

    def _drop(self, ref: TensorRef) -> None:
        memory = self._on_device(ref)
        if self.resident.get(ref) == self.at.program:
            raise self._refuse(f"{ref} is resident: it is never dropped")
        self._touch(memory, write=True)
        memory.alive, memory.author = False, NOTHING
        if memory.slot is not None:
            self.slots.leave(self.at.program, ref, memory.slot)
            memory.slot = None

    def _swap_in(self, ref: TensorRef) -> None:
        memory = self._empty(self.at.program, ref)
        self._touch(memory, write=True)
        memory.author = self._read_host(ref)

    def _swap_out(self, ref: TensorRef, stage: int | None, over: TensorRef | None) -> None:
        is_resident = self.resident.get(ref) == self.at.program
        if not (ref.is_value or ref.is_gradient_part or is_resident):
            raise self._refuse("weights change on the host only, unless they are resident")
        author = self._read_by_device(ref)
        if ref.is_parameter:
            for memory in self._on_host(ref):
                self._touch(memory, write=True)
                memory.author = author
            return
        cell: Cell = ("host", self.moved.get(ref, ref))
        if stage is not None:
            self.stages.enter(self.at.program, ref, stage)
            cell = ("stage", self.at.program, stage)
        elif over is not None:
            cell = self._take_over(ref, over)
        elif ref not in self.copies[ref.kind, ref.first]:
            self.copies[ref.kind, ref.first].append(ref)
        memory = self.memories[cell]
        self._touch(memory, write=True)
        memory.author = author

    def _take_over(self, ref: TensorRef, old: TensorRef) -> Cell:
        """Let a value have the host memory of another one, which nobody can read from then on."""
        copies = self.copies[old.kind, old.first]
        if old not in copies or ref in self.copies[ref.kind, ref.first]:
            raise self._refuse(f"{ref} cannot take the memory of {old} on the host")
        if ref.nbytes(self.graph) > old.nbytes(self.graph):
            raise self._refuse(f"{ref} is larger than {old}, whose memory it takes")
        self.moved[ref] = self.moved.get(old, old)
        copies.remove(old)
        self.copies[ref.kind, ref.first].append(ref)
        return ("host", self.moved[ref])

    def _send(self, ref: TensorRef, peer: int) -> None:
        author = self._read_by_device(ref)
        memory = self._empty(peer, ref)
        self._touch(memory, write=True)
        memory.author = author

    def _run(self, step: Instruction) -> None:
        assert step.task is not None
        on_host = self.at.program == self.schedule.num_devices
        for ref in step.reads:
            author = self._read_by_host(step.task, ref) if on_host else self._read_by_device(ref)
            expected = self.authors.of[step.task, ref]
            if author != expected:
                raise self._refuse(f"{step.task} reads {ref} of {author}, not of {expected}")
        for ref in step.writes:
            if on_host:
                for memory in self._on_host(ref):
                    self._touch(memory, write=True)
                    memory.author = step.task
            else:
                self._write_on_device(step, ref)
        if on_host and step.task.addend is not None:
            self.stages.leave(self.stages.of(step.task.addend))

    def _write_on_device(self, step: Instruction, ref: TensorRef) -> None:
        memory = self._device(ref)
        if not memory.alive and not ref.is_value:
            raise self._refuse(f"{ref} has no slot on {self._here}")
        if memory.alive and memory.author is not NOTHING and ref not in step.reads:
            raise self._refuse(f"{ref} is overwritten, not added to")
        self._touch(memory, write=True)
        assert step.task is not None
        memory.alive, memory.author = True, step.task

    # -- memories ---------------------------------------------------------------------------

    def _read_by_device(self, ref: TensorRef) -> Author:
        memory = self._on_device(ref)
        if memory.author is NOTHING:
            raise self._refuse(f"{ref} has memory on {self._here}, but nothing is in it yet")
        self._touch(memory, write=False)
        return memory.author

    def _read_by_host(self, task: Task, ref: TensorRef) -> Author:
        is_left = task.kind is TaskKind.LATE_UPDATE  # by the step before
        came = is_left or self.copies[ref.kind, ref.first]
        if ref.is_gradient_part and ref.part == 0 and not came:
            raise self._refuse(f"{ref} was never swapped out")
        return self._read_host(ref)

    def _read_host(self, ref: TensorRef) -> Author:
        """Read every part of a tensor on the host; they must be of one author."""
        authors = []
        for memory in self._on_host(ref):
            self._touch(memory, write=False)
            authors.append(START if memory.author is NOTHING else memory.author)
        return self._one_author(ref, authors)

    def _one_author(self, ref: TensorRef, authors: Sequence[Author]) -> Author:
        one, *others = dict.fromkeys(authors)
        if not others:
            return one
        if not all(author == START or _is_late(author) for author in authors):
            several = map(str, dict.fromkeys(authors))
            raise self._refuse(f"{ref} is partly of {' and partly of '.join(several)}")
        return tuple(author for author in authors if not isinstance(author, tuple))

    def _on_host(self, ref: TensorRef) -> list[_Memory]:
        """The memories that hold a tensor on the host."""
        return [self.memories[cell] for cell in self._host_cells(ref)]

    def _host_cells(self, ref: TensorRef) -> Iterable[Cell]:
        if ref.kind is TensorKind.WEIGHTS:
            # Layer by layer: FORWARD and BACKWARD pack them differently.
            return [(ref.kind, layer) for layer in range(ref.first, ref.last)]
        if ref.part:
            return [("stage", *self.stages.of(ref))]
        if ref.is_value:
            copy = self._host_copy(ref)
            if copy is None:
                raise self._refuse(f"nothing on the host holds {ref}")
            return [("host", self.moved.get(copy, copy))]
        return [("host", ref)]

    def _host_copy(self, ref: TensorRef) -> TensorRef | None:
        """The copy on the host that ``ref`` is, or is a part of; None if there is none."""
        copies = self.copies[ref.kind, ref.first]
        if ref in copies:
            return ref
        for copy in copies:
            if _within(ref, copy):
                return copy
        if ref in self.found:  # the FORWARDs have left it there, and not on the host
            return None
        return ref if (ref.kind, ref.first) in self.given else None

    def _on_device(self, ref: TensorRef) -> _Memory:
        memory = self._device(ref)
        if not memory.alive:
            raise self._refuse(f"{ref} is not on {self._here}")
        return memory

    def _empty(self, device: int, ref: TensorRef) -> _Memory:
        memory = self.memories[device, ref]
        if not memory.alive:
            raise self._refuse(f"{ref} has no memory on gpu{device}")
        if memory.author is not NOTHING:
            raise self._refuse(f"{ref} is on gpu{device} already")
        return memory

    def _device(self, ref: TensorRef) -> _Memory:
        return self.memories[self.at.program, ref]

    def _touch(self, memory: _Memory, *, write: bool) -> None:
        """Refuse an access that some earlier one may still be busy with."""
        earlier = [] if memory.written is None else [memory.written]
        if write:
            earlier += memory.read
        for access, place in earlier:
            if not self.clocks.is_over(access):
                what = _name(memory.cell)
                raise self._refuse(f"{what}: nothing makes this wait for {self._at(place)}")
        now = (self.clocks.now, self.at)
        if write:
            memory.written, memory.read = now, []
        else:
            # Later on the same stream stands for earlier on it.
            others = [r for r in memory.read if r[0][0] != now[0][0]]
            memory.read = [*others, now]

    @property
    def _here(self) -> str:
        return f"gpu{self.at.program}"

    def _at(self, place: Position) -> str:
        name, program = list(self.schedule.all_programs())[place.program]
        return f"{program[place.index]} of {name}, instruction {place.index}"

    def _refuse(self, why: str) -> ScheduleError:
        return refuse(self.schedule, self.at, why)


def _within(part: TensorRef, whole: TensorRef) -> bool:
    a, b = part.samples, whole.samples
    return a is not None and b is not None and b[0] <= a[0] and a[1] <= b[1]


def _name(cell: Cell) -> str:
    if not isinstance(cell, tuple):
        return str(cell)
    place, *rest = cell
    where = f"gpu{place}" if isinstance(place, int) else getattr(place, "value", place)
    return f"{where} {' '.join(map(str, rest))}"


class _Authors:
    """Who, in plain PyTorch, wrote what each task reads.

    Attributes:
        of: per task and tensor it reads, the task that wrote it last, or ``START``.
        final: per tensor the task that writes it last of all.
    """

    def __init__(self, runs: Sequence[Instruction]) -> None:
        self.of: dict[tuple[Task, TensorRef], Author] = {}
        self.final: dict[TensorRef, Author] = {}
        self._late: dict[int, Task] = {}
        late, made = self._late, defaultdict[tuple[TensorKind, int], list[TensorRef]](list)
        for step in sorted(runs, key=_plain_order):
            assert step.task is not None
            for ref in step.reads:
                if ref in self.final or not ref.is_value:
                    source = ref
                else:
                    source = next((m for m in made[ref.kind, ref.first] if _within(ref, m)), ref)
                self.of[step.task, ref] = self.final.get(source) or self._by_layer(ref)
            for ref in step.writes:
                self.final[ref] = step.task
                if ref.kind is TensorKind.WEIGHTS and _is_late(step.task):
                    late.update(dict.fromkeys(range(ref.first, ref.last), step.task))
                if ref.is_value:
                    made[ref.kind, ref.first].append(ref)

    def _by_layer(self, ref: TensorRef) -> Author:
        """Who wrote weights that no task has written as a whole."""
        if ref.kind is not TensorKind.WEIGHTS:
            return START
        found = tuple(self._late.get(layer, START) for layer in range(ref.first, ref.last))
        return found if len(set(found)) > 1 else found[0]


def _is_late(author: Author) -> bool:
    return isinstance(author, Task) and author.kind is TaskKind.LATE_UPDATE


def _plain_order(step: Instruction) -> tuple[int, int, int, int]:
    """Late updates, FORWARD packs ascending, BACKWARD packs descending, parts, then updates."""
    task = step.task
    assert task is not None
    start = task.samples[0] if task.samples else 0
    if _is_late(task):
        return -1, task.pack.first, 0, 0
    if task.kind is TaskKind.FORWARD:
        return 0, task.pack.first, start, 0
    if task.kind is TaskKind.BACKWARD:
        return 1, -task.pack.first, start, 0
    if task.addend is not None:
        return 2, task.addend.part, 0, 0
    return 3, -task.pack.first, 0, 0


def _expected_authors(schedule: Schedule) -> _Authors:
    programs = [program for _, program in schedule.all_programs()]
    return _Authors([step for program in programs for step in program if step.op is Op.RUN])
