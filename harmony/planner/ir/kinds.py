"""What a span of a timeline is called: the work it does, or what it carries.

One place, used for predicted and for measured timelines, so that the two can be compared.
"""

from __future__ import annotations

from harmony.core.layergraph import MODEL_INPUT, LayerGraph
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import TaskKind, TensorKind, TensorRef

_WORK = {
    TaskKind.FORWARD: "forward",
    TaskKind.BACKWARD: "backward",
    TaskKind.UPDATE: "update",
    TaskKind.LATE_UPDATE: "update",
    TaskKind.ACCUMULATE: "accumulate",
    TaskKind.NORMS: "accumulate",
}


def span_kind(step: Instruction, graph: LayerGraph, *, for_backward: bool = True) -> str:
    """Return the kind of a Run, SwapIn, SwapOut or Send (see `harmony.core.timeline.Span`).

    Args:
        for_backward: of a value on its way over the host, whether a BACKWARD reads it next;
            one instruction alone does not tell, `span_kinds` does.
    """
    if step.task is not None:
        return _WORK[step.task.kind]
    if step.ref is None:
        return ""
    if step.ref.is_parameter:
        return "weights"
    if step.ref.is_gradient_part:
        return "gradients"
    if step.ref.is_kept:
        return "saved"
    if step.op is Op.SEND or step.ref.kind is TensorKind.VALUE_GRADIENT:
        return "activations"
    value = graph.values[step.ref.first]
    if value.producer == MODEL_INPUT:
        return "inputs"
    if step.op is Op.SWAP_OUT and value.is_output and not value.consumers:
        return "outputs"
    return "stash" if for_backward else "activations"


def span_kinds(schedule: Schedule, graph: LayerGraph) -> dict[str, tuple[str, ...]]:
    """Return the kind of each instruction, per program; empty for those that make no span."""
    stashed: dict[int, bool] = {}
    swapped: dict[str, list[bool]] = {}
    for name, program in schedule.all_programs():
        swapped[name] = _read_by_backward(program)
        for step, backward in zip(program, swapped[name], strict=True):
            if step.op is Op.SWAP_IN and step.ref is not None and _is_passed(step):
                stashed[step.ref.first] = stashed.get(step.ref.first, False) or backward
    kinds = {}
    for name, program in schedule.all_programs():
        kinds[name] = tuple(
            _kind(step, graph, backward, stashed)
            for step, backward in zip(program, swapped[name], strict=True)
        )
    return kinds


def _kind(step: Instruction, graph: LayerGraph, backward: bool, stashed: dict[int, bool]) -> str:
    if step.op not in (Op.RUN, Op.SWAP_IN, Op.SWAP_OUT, Op.SEND):
        return ""
    passed = step.ref is not None and not step.ref.is_kept
    if step.op is Op.SWAP_OUT and step.ref is not None and passed:
        # What nobody fetches in this step is an output, or kept for a BACKWARD to come.
        if step.ref.is_value and step.ref.first not in stashed:
            is_output = graph.values[step.ref.first].is_output
            return "outputs" if is_output and _is_passed(step) else span_kind(step, graph)
        backward = stashed.get(step.ref.first, True)
    return span_kind(step, graph, for_backward=backward)


def _is_passed(step: Instruction) -> bool:
    return step.ref is not None and step.ref.kind is TensorKind.VALUE


def _read_by_backward(program: tuple[Instruction, ...]) -> list[bool]:
    """Per instruction, whether the next Run that reads its tensor is a BACKWARD."""
    reader: dict[TensorRef, TaskKind] = {}
    found = []
    for step in reversed(program):
        if step.op is Op.RUN and step.task is not None:
            reader.update(dict.fromkeys(step.reads, step.task.kind))
        is_backward = step.ref is not None and reader.get(step.ref) is TaskKind.BACKWARD
        found.append(is_backward)
    return found[::-1]
