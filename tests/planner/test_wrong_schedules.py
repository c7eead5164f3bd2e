"""The checker refuses wrong schedules: each instruction of several changed in every way we know.

Some changes leave a schedule right: a copy that comes twice, two neighbours on different streams.
What the checker accepts is therefore run, in orders drawn at random, by an interpreter that shares
nothing with it (`tests.planner.interpret`): it must find nothing wrong.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from harmony.errors import PlanError
from harmony.planner.check.verify import verify
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import DEVICE_STREAMS, Instruction, Op, Schedule
from harmony.planner.ir.tasks import Phase, TensorKind, TensorRef
from tests.planner.interpret import Plain, runs_right
from tests.planner.test_verify import CASES, lowered
from tests.toys import chain, packs
from tests.toys import step as step_of

SMALL = {
    "one gpu": CASES["one gpu"],
    "pp": (chain(4), step_of(2, 1, packs(1, 2), packs(1, 2, 4)), 2, Policy()),
    "dp, tied": (
        chain(3, tied=True),
        step_of(2, 1, packs(1), packs(1, 3), replicas=2),
        2,
        Policy(),
    ),
    "unequal microbatches": (
        chain(3, frozen=(0,)),
        step_of(2, 2, packs(1), packs(1, 3), backward_size=1),
        2,
        Policy(),
    ),
    **{
        name: CASES[name]
        for name in (
            "results of products, beside what is saved",
            "resident, one pack of three",
            "resident, tied within the pack",
            "forward",
            "forward that leaves activations",
            "backward that finds them",
        )
    },
    "resident, all": (
        chain(3, frozen=(0,)),
        replace(step_of(2, 1, packs(1, 2), packs(1, 2, 3)), saved=packs(1, 2)),
        2,
        Policy(resident=packs(1, 2, 3), mirror=True),
    ),
    "backward": (
        chain(3, tied=True, input_gradient=True),
        step_of(2, 1, packs(2, 3), packs(1, 2, 3), phase=Phase.BACKWARD),
        1,
        Policy(1, 1, 1),
    ),
}
OTHER_KIND = {
    TensorKind.VALUE: TensorKind.VALUE_GRADIENT,
    TensorKind.VALUE_GRADIENT: TensorKind.VALUE,
    TensorKind.PRODUCTS: TensorKind.SAVED,
    TensorKind.SAVED: TensorKind.WEIGHTS,
    TensorKind.WEIGHTS: TensorKind.STATE,
    TensorKind.STATE: TensorKind.WEIGHTS,
    TensorKind.WEIGHT_GRADIENTS: TensorKind.WEIGHTS,
    TensorKind.SHARED: TensorKind.SHARED_GRADIENTS,
    TensorKind.SHARED_GRADIENTS: TensorKind.SHARED,
}
OTHER_OP = {
    Op.ALLOC: (Op.DROP, "compute"),
    Op.DROP: (Op.ALLOC, "compute"),
    Op.SWAP_IN: (Op.SWAP_OUT, "d2h"),
    Op.SWAP_OUT: (Op.SWAP_IN, "h2d"),
    Op.SEND: (Op.SWAP_OUT, "d2h"),
    Op.RECORD: (Op.WAIT, "compute"),
    Op.WAIT: (Op.RECORD, "compute"),
}


Change = Callable[[Schedule], Iterator[Schedule]]


def with_program(schedule: Schedule, number: int, program: tuple[Instruction, ...]) -> Schedule:
    """The schedule with one program, or with the host's, replaced."""
    if number == schedule.num_devices:
        return replace(schedule, host=program)
    programs = list(schedule.programs)
    programs[number] = program
    return replace(schedule, programs=tuple(programs))


def swapped(schedule: Schedule) -> Iterator[Schedule]:
    """Each instruction and the next one in the other order."""
    for number, (_, program) in enumerate(schedule.all_programs()):
        for i in range(len(program) - 1):
            turned = (*program[:i], program[i + 1], program[i], *program[i + 2 :])
            yield with_program(schedule, number, turned)


def doubled(schedule: Schedule) -> Iterator[Schedule]:
    """Each instruction twice."""
    for number, (_, program) in enumerate(schedule.all_programs()):
        for i in range(len(program)):
            yield with_program(schedule, number, (*program[: i + 1], *program[i:]))


def moved(schedule: Schedule) -> Iterator[Schedule]:
    """Each instruction in the program after its own, at the same place."""
    programs = [program for _, program in schedule.all_programs()]
    for number, program in enumerate(programs):
        for i, step in enumerate(program):
            target = (number + 1) % len(programs)
            less = with_program(schedule, number, (*program[:i], *program[i + 1 :]))
            other = programs[target]
            yield with_program(less, target, (*other[:i], step, *other[i:]))


def retargeted(schedule: Schedule) -> Iterator[Schedule]:
    """Each instruction with another tensor, slot, device, event or stream."""
    steps = [step for _, program in schedule.all_programs() for step in program]
    refs = sorted({step.ref for step in steps if step.ref is not None}, key=str)
    for number, program, i, step in each(schedule):
        for other in others(step, refs, schedule.num_devices):
            yield with_program(schedule, number, (*program[:i], other, *program[i + 1 :]))


def each(
    schedule: Schedule,
) -> Iterator[tuple[int, tuple[Instruction, ...], int, Instruction]]:
    for number, (_, program) in enumerate(schedule.all_programs()):
        for i, step in enumerate(program):
            yield number, program, i, step


def others(step: Instruction, refs: list[TensorRef], num_devices: int) -> Iterator[Instruction]:
    """The same instruction about something else."""
    if step.ref is not None:
        likes = [ref for ref in refs if ref.kind is step.ref.kind]
        at = likes.index(step.ref)
        for like in {likes[at - 1], likes[(at + 1) % len(likes)]} - {step.ref}:
            yield step._replace(ref=like)
        yield step._replace(slot=(step.slot or 0) + 1)
        yield step._replace(slot=None if step.slot is not None else 0)
    if step.peer is not None:
        for peer in range(-1, num_devices + 1):
            if peer != step.peer:
                yield step._replace(peer=peer)
    if step.event is not None:
        for by in (-1, 1, 2):
            yield step._replace(event=max(0, step.event + by))
    streams = (*DEVICE_STREAMS, "update", DEVICE_STREAMS[0])
    yield step._replace(stream=streams[streams.index(step.stream) + 1])


def without_a_read(schedule: Schedule) -> Iterator[Schedule]:
    """Each Run without one of the tensors it reads, and with two of them in the other order."""
    for number, program, i, step in each(schedule):
        for k in range(len(step.reads)):
            less = step._replace(reads=step.reads[:k] + step.reads[k + 1 :])
            yield with_program(schedule, number, (*program[:i], less, *program[i + 1 :]))
        if len(set(step.reads)) > 1:
            turned = step._replace(reads=step.reads[::-1])
            yield with_program(schedule, number, (*program[:i], turned, *program[i + 1 :]))


def with_a_wrong_write(schedule: Schedule) -> Iterator[Schedule]:
    """Each Run that writes less, or something of another kind; other operations become others."""
    for number, program, i, step in each(schedule):
        changed = []
        for k, ref in enumerate(step.writes):
            wrong = replace(ref, kind=OTHER_KIND[ref.kind])
            changed.append(step._replace(writes=step.writes[:k] + step.writes[k + 1 :]))
            changed.append(step._replace(writes=(*step.writes[:k], wrong, *step.writes[k + 1 :])))
        if step.op in OTHER_OP:
            op, stream = OTHER_OP[step.op]
            is_event = step.event is not None
            changed.append(step._replace(op=op, stream=step.stream if is_event else stream))
        for other in changed:
            yield with_program(schedule, number, (*program[:i], other, *program[i + 1 :]))


@pytest.mark.parametrize("name", CASES)
def test_what_is_lowered_runs_right_in_any_order(name: str) -> None:
    graph, spec, num_devices, policy = CASES[name]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    assert runs_right(schedule, tasks, Plain(tasks), range(12)) == ""


def test_the_interpreter_sees_races_and_stale_reads() -> None:
    """Without it, what the next tests say would mean nothing."""
    graph, spec, num_devices, policy = SMALL["pp"]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    plain = Plain(tasks)
    waits = found = 0
    for number, program, i, step in each(schedule):
        if step.op is Op.WAIT:
            waits += 1
            mutant = with_program(schedule, number, (*program[:i], *program[i + 1 :]))
            found += bool(runs_right(mutant, tasks, plain, range(40)))
    assert waits > 30
    assert found >= 0.8 * waits, f"{found} of {waits} missing Waits show in 40 orders"


@pytest.mark.parametrize("change", [swapped, doubled, moved, retargeted])
@pytest.mark.parametrize("name", SMALL)
def test_a_changed_schedule_that_is_accepted_is_right(name: str, change: Change) -> None:
    graph, spec, num_devices, policy = SMALL[name]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    plain = Plain(tasks)
    for mutant in change(schedule):
        try:
            verify(mutant, graph, None, spec.phase, tasks)
        except PlanError:
            continue
        wrong = runs_right(mutant, tasks, plain, range(3))
        assert wrong == "", f"accepted, and wrong: {wrong}\n{difference(schedule, mutant)}"


@pytest.mark.parametrize("change", [without_a_read, with_a_wrong_write])
@pytest.mark.parametrize("name", SMALL)
def test_no_run_can_read_less_and_nothing_can_do_something_else(name: str, change: Change) -> None:
    graph, spec, num_devices, policy = SMALL[name]
    schedule, tasks = lowered(graph, spec, num_devices, policy)
    for mutant in change(schedule):
        with pytest.raises(PlanError):
            verify(mutant, graph, None, spec.phase, tasks)
            pytest.fail(difference(schedule, mutant))


def difference(schedule: Schedule, mutant: Schedule) -> str:
    """The lines that differ."""
    lines = difflib.unified_diff(str(schedule).splitlines(), str(mutant).splitlines(), n=1)
    return "\n".join(lines)
