"""The pack whose parameters or gradients an instruction moves."""

from __future__ import annotations

from collections.abc import Sequence

from harmony.planner.ir.schedule import Instruction, Op
from harmony.planner.ir.tasks import Pack, TaskKind, TensorRef


def packs_of(program: Sequence[Instruction]) -> list[Pack | None]:
    """Per instruction that moves parameters or gradients, the pack that it moves them for.

    Parameters, and gradients that an earlier round has begun, come in for the next task that reads
    them, gradients go out for the last one that wrote them. It matters for shared parameters:
    where they lie in a slot depends on the pack.
    """
    packs: list[Pack | None] = [None] * len(program)
    writer: dict[TensorRef, Pack] = {}
    for at, step in enumerate(program):
        if step.task is not None:
            writer.update({ref: step.task.pack for ref in step.writes if ref.is_gradient_part})
        elif step.op is Op.SWAP_OUT and step.ref in writer:
            packs[at] = writer[step.ref]
    reader: dict[TensorRef, Pack] = {}
    for at, step in reversed(list(enumerate(program))):
        if step.task is not None:
            moved = (ref for ref in step.reads if ref.is_parameter or ref.is_gradient_part)
            reader.update(dict.fromkeys(moved, step.task.pack))
        elif step.op is Op.SWAP_IN and step.ref in reader:
            packs[at] = reader[step.ref]
    return packs


def writers_of(program: Sequence[Instruction]) -> dict[TensorRef, Pack]:
    """The pack whose BACKWARD writes each tensor."""
    return {
        ref: step.task.pack
        for step in program
        if step.task is not None and step.task.kind is TaskKind.BACKWARD
        for ref in step.writes
    }
