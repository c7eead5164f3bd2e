"""Instructions with the memory they touch, written in one global order for all programs.

Every step is written after all that it needs, whatever programs those are in. So the programs
that are cut out of the list cannot deadlock, and `events` can find every ordering that must be
enforced without knowing what the instructions are for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

from harmony.planner.ir.schedule import HOST_STREAM, Instruction, Op
from harmony.planner.ir.tasks import Task, TaskGraph, TensorKind, TensorRef

HOST_PROGRAM = -1
Cell = Hashable
"""Some memory: a tensor on a device or on the host, a staging buffer, weights of a layer."""


class PlacedInstruction(NamedTuple):
    """An instruction, its program and the memory that it touches, by the numbers of its cells."""

    program: int
    instruction: Instruction
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


class StepList:
    """The steps written so far."""

    def __init__(self, reused: TaskGraph | None = None) -> None:
        """Begin an empty list.

        Args:
            reused: tasks whose rounds use the same host memory for values; None for none.
        """
        self.steps: list[PlacedInstruction] = []
        self._reused = reused
        self._memory_of: dict[TensorRef, TensorRef] = {}
        # By its bytes what has come back from the host, whose memory there is free again.
        self._free: dict[int, deque[TensorRef]] = defaultdict(deque)
        self._number: dict[Cell, int] = {}
        self.stage_of: dict[TensorRef, tuple[int, int]] = {}

    def alloc(self, device: int, ref: TensorRef, slot: int | None = None) -> None:
        """Take memory for a tensor."""
        step = Instruction("compute", Op.ALLOC, ref=ref, slot=slot)
        self._add(device, step, (), [(device, ref)])

    def drop(self, device: int, ref: TensorRef) -> None:
        """Give the memory of a tensor back."""
        self._add(device, Instruction("compute", Op.DROP, ref=ref), (), [(device, ref)])

    def swap_in(self, device: int, ref: TensorRef, source: TensorRef) -> None:
        """Copy ``ref`` from the host, where it is (a part of) ``source``."""
        step = Instruction("h2d", Op.SWAP_IN, ref=ref)
        self._add(device, step, self._host_cells(source), [(device, ref)])
        if ref.is_kept and self._reused is not None:  # one BACKWARD reads it, and nobody else
            self._free[ref.nbytes(self._reused.layers)].append(ref)

    def swap_out(self, device: int, ref: TensorRef, stage: int | None = None) -> None:
        """Copy ``ref`` to the host; a part of a gradient to a staging buffer."""
        if stage is not None:
            self.stage_of[ref] = (device, stage)
        over = None
        if ref.is_value and ref not in self._memory_of:
            over = self._over(ref)
            self._memory_of[ref] = ref if over is None else self._memory_of[over]
        step = Instruction("d2h", Op.SWAP_OUT, ref=ref, slot=stage, over=over)
        self._add(device, step, [(device, ref)], self._host_cells(ref))

    def send(self, device: int, ref: TensorRef, peer: int) -> None:
        """Copy ``ref`` to another device."""
        step = Instruction("p2p", Op.SEND, ref=ref, peer=peer)
        self._add(device, step, [(device, ref)], [(peer, ref)])

    def run(
        self, device: int, task: Task, reads: Sequence[TensorRef], writes: Sequence[TensorRef]
    ) -> None:
        """Run a task on a device."""
        step = Instruction("compute", Op.RUN, task, tuple(reads), tuple(writes))
        self._add(device, step, [(device, r) for r in reads], [(device, r) for r in writes])

    def run_on_host(
        self, task: Task, reads: Sequence[TensorRef], writes: Sequence[TensorRef]
    ) -> None:
        """Run an UPDATE or ACCUMULATE."""
        step = Instruction(HOST_STREAM, Op.RUN, task, tuple(reads), tuple(writes))
        read = [cell for ref in reads for cell in self._host_cells(ref)]
        written = [cell for ref in writes for cell in self._host_cells(ref)]
        self._add(HOST_PROGRAM, step, read, written)

    def _add(
        self, program: int, step: Instruction, reads: Sequence[Cell], writes: Sequence[Cell]
    ) -> None:
        self.steps.append(
            PlacedInstruction(program, step, self._numbers(reads), self._numbers(writes))
        )

    def _numbers(self, cells: Sequence[Cell]) -> tuple[int, ...]:
        known = self._number
        return tuple([known.setdefault(cell, len(known)) for cell in cells])

    def _host_cells(self, ref: TensorRef) -> list[Cell]:
        """Memory of a tensor on the host; weights count layer by layer, since F and B pack them
        differently."""
        if ref.kind is TensorKind.WEIGHTS:
            return [(ref.kind, layer) for layer in range(ref.first, ref.last)]
        if ref.part:
            return [("stage", *self.stage_of[ref])]
        return [("host", self._memory_of.get(ref, ref))]

    def _over(self, ref: TensorRef) -> TensorRef | None:
        """The value of an earlier round in whose memory on the host this one can lie."""
        tasks = self._reused
        if tasks is None or ref.samples is None:
            return None
        if ref.is_kept:
            nbytes = ref.nbytes(tasks.layers)
            large = [size for size, free in self._free.items() if free and size >= nbytes]
            return self._free[min(large)].popleft() if large else None
        if ref.first in tasks.layers.output_ids:  # of those the host is to have all in the end
            return None
        samples = tasks.spec.an_earlier_round(ref.samples)
        before = None if samples is None else replace(ref, samples=samples)
        return before if before in self._memory_of else None
