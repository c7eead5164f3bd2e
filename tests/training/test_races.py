"""Every event that a schedule has is needed: without it the race checker fires."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import harmony
from harmony.engine.step_result import ReadyStep
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Phase, TaskKind
from harmony.runtime.exec.executor import Job
from tests import devices
from tests import race_check as racecheck
from tests.training.models import GPT, token_batch, token_loss


def ready_model(mode: str, num_devices: int) -> Any:
    """A model that has trained a step, and what it takes to run other schedules on it."""
    torch.manual_seed(0)
    model = harmony.Harmony(
        GPT(depth=2),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3},
        loss_fn=token_loss,
        mode=mode,
        microbatch_size=4,
        devices=num_devices,
        device_memory="420KiB",
    )
    model.train_step(*token_batch(0))
    (variant,) = model._engine.variants
    return model, variant, variant.prepared(variant._plans[8], Phase.TRAIN)


def run(model: Any, variant: Any, schedule: Schedule, values: Any) -> None:
    prepared = variant.executor.prepare(schedule, values)
    prepared.num_runs = 1
    replay = model._engine.replay_state(ReadyStep(variant, variant._plans[8], {}, {}))
    spec = model.plan.spec
    replicas = range(len(spec.shares))
    every = [s for replica in replicas for s in spec.microbatches(replica, TaskKind.BACKWARD)]
    weights = {(variant.graph.loss, (low, high)): (high - low) / 8 for low, high in every}
    variant.executor.run(prepared, Job(replay, weights))


def waits(schedule: Schedule) -> list[tuple[int, int]]:
    programs = [*schedule.programs, schedule.host]
    return [
        (index, at)
        for index, program in enumerate(programs)
        for at, step in enumerate(program)
        if step.op is Op.WAIT
    ]


def without(schedule: Schedule, index: int, at: int) -> Schedule:
    programs: list[tuple[Instruction, ...]] = [*schedule.programs, schedule.host]
    programs[index] = programs[index][:at] + programs[index][at + 1 :]
    return replace(schedule, programs=tuple(programs[:-1]), host=programs[-1])


def at_the_edge(schedule: Schedule, index: int, at: int) -> bool:
    """Whether a wait orders a slot's use only with the step before or after.

    The first copy into a slot waits for nothing of its own step, and a slot's last Drop frees it
    for the next step; between two steps everything is waited for anyway.
    """
    program = [*schedule.programs, schedule.host][index]
    later = (step for step in program[at + 1 :] if step.stream == program[at].stream)
    after = next(step for step in later if step.op is not Op.WAIT)
    if after.ref is None or after.ref.is_value:
        return False
    if after.op is Op.SWAP_IN:
        return not any(s.op is Op.DROP and _same_kind(s, after) for s in program[:at])
    return after.op is Op.DROP and not any(
        s.op is Op.ALLOC and _same_kind(s, after) for s in program[at:]
    )


def _same_kind(one: Instruction, two: Instruction) -> bool:
    assert two.ref is not None
    return one.ref is not None and one.ref.is_parameter == two.ref.is_parameter


@pytest.mark.parametrize(("mode", "num_devices"), [("pp", 1), ("pp", 2), ("dp", 2)])
def test_every_removed_wait_is_found(mode: str, num_devices: int) -> None:
    devices.provide(count=4, memory="64MiB")
    model, variant, prepared = ready_model(mode, num_devices)
    schedule, values = prepared.schedule, prepared.values
    with racecheck.checked(ordered_frees=True):
        run(model, variant, schedule, values)
    missed = []
    for index, at in waits(schedule):
        mutant = without(schedule, index, at)
        try:
            with racecheck.checked(ordered_frees=True):
                run(model, variant, mutant, values)
        except (harmony.RaceError, harmony.ExecutionError, harmony.ScheduleError):
            devices.recover()
            continue
        if not at_the_edge(schedule, index, at):
            missed.append((index, str([*schedule.programs, schedule.host][index][at])))
    assert not missed, f"{len(missed)} of {len(waits(schedule))} removed waits were not noticed"
    assert len(waits(schedule)) > 10
