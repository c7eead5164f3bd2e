"""The text forms of tensors, tasks, instructions and schedules read back as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmony.errors import PlanError
from harmony.planner.ir.schedule import Schedule, parse_instruction
from harmony.planner.ir.tasks import Pack, Task, TaskKind, TensorKind, TensorRef

SAMPLES = st.tuples(st.integers(0, 99), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1]))
PACKS = st.tuples(st.integers(0, 99), st.integers(1, 9)).map(lambda p: Pack(p[0], p[0] + p[1]))


@st.composite
def refs(draw: st.DrawFn) -> TensorRef:
    kind = draw(st.sampled_from(TensorKind))
    pack = draw(PACKS)
    kept = (TensorKind.SAVED, TensorKind.PRODUCTS)
    sampled = (TensorKind.VALUE, TensorKind.VALUE_GRADIENT, *kept)
    samples = draw(SAMPLES) if kind in sampled else None
    parts = (TensorKind.WEIGHT_GRADIENTS, TensorKind.SHARED_GRADIENTS)
    part = draw(st.integers(0, 5)) if kind in parts else 0
    whole = (TensorKind.WEIGHTS, TensorKind.WEIGHT_GRADIENTS, TensorKind.STATE)
    ranged = kind in (*whole, *kept)
    last = pack.last if ranged else pack.first + 1
    return TensorRef(kind, pack.first, last, samples, part)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    kind = draw(st.sampled_from(TaskKind))
    if kind is TaskKind.ACCUMULATE:
        addend = draw(refs().filter(lambda ref: ref.is_gradient_part))
        return Task(kind, Pack(addend.first, addend.last), None, addend)
    samples = draw(SAMPLES) if kind in (TaskKind.FORWARD, TaskKind.BACKWARD) else None
    return Task(kind, draw(PACKS), samples)


@given(refs())
def test_tensors(ref: TensorRef) -> None:
    assert TensorRef.parse(str(ref)) == ref


@given(tasks())
def test_tasks(task: Task) -> None:
    assert Task.parse(str(task)) == task


@pytest.mark.parametrize(
    "line",
    [
        "compute Alloc W[0:2] slot 1",
        "h2d SwapIn W[0:2]",
        "d2h SwapOut dW[0:2]%1 stage 0",
        "p2p Send X4@0:2 gpu1",
        "compute Run F[0:2]@0:4 (W[0:2] X0@0:4) -> X2@0:4",
        "compute Run B[0:2]@0:4 () ->",
        "compute Wait e12",
    ],
)
def test_instructions(line: str) -> None:
    step = parse_instruction(line)
    assert f"{step.stream} {step}" == line
    assert parse_instruction(f"{step.stream} {step}") == step


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("gpu Run", "no such stream"),
        ("h2d SwapIn W4", "written another way"),
        ("h2d Swap W[0:2]", "not an instruction"),
        ("compute Run F[0:2] () ->", "F and B name a microbatch"),
    ],
)
def test_what_cannot_be_read_is_shown(line: str, why: str) -> None:
    text = f"schedule minibatch=1\nprogram gpu0\n  {line}\n"
    with pytest.raises(PlanError, match=f"line 3 of the schedule: .*{why}"):
        Schedule.parse(text)
