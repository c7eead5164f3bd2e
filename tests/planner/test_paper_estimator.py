"""The original's estimator in our form: its times, bytes and memory, to the digits it printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack
from research.original.estimator import SERVER, estimate_events, estimate_s
from research.original.four_tuple import FourTuple, covering
from research.original.quick import Question, Quick
from research.original.tables import Profiles, ScheduleRow, read_schedules
from research.original.traffic import closed_forms, peak_nbytes

DATA = Path(__file__).parents[1] / "data" / "reference"
PROFILES = Profiles(DATA / "profiles")
SCHEDULES = read_schedules(DATA / "schedules.csv")
PRINTED = 0.00006
"""The table has four digits after the point; a step is up to 400 s long."""


def name_of(row: ScheduleRow) -> str:
    return f"{row.model}-{row.name}"


def cuts(packs: tuple[Pack, ...]) -> list[int]:
    return [0, *(pack.last for pack in packs)]


def test_the_reference_data_has_44_schedules() -> None:
    assert len(SCHEDULES) == 44
    assert {row.plan.mode for row in SCHEDULES} == {"DP", "PP"}


@pytest.mark.parametrize("row", SCHEDULES, ids=name_of)
def test_step_time_without_and_with_prefetch_is_the_originals(row: ScheduleRow) -> None:
    profile = PROFILES[row.model]
    assert estimate_s(profile, row.plan, prefetch=False) == pytest.approx(row.plain_s, abs=PRINTED)
    times, _ = estimate_events(profile, row.plan, prefetch=True)
    assert times.makespan_s == pytest.approx(row.prefetch_s, abs=PRINTED)


@pytest.mark.parametrize("row", SCHEDULES, ids=name_of)
def test_bytes_and_memory_are_the_originals(row: ScheduleRow) -> None:
    profile = PROFILES[row.model]
    assert closed_forms(profile, row.plan) == row.traffic
    assert estimate_events(profile, row.plan, prefetch=False)[1] == row.traffic
    assert peak_nbytes(profile, row.plan) == row.memory_nbytes


@pytest.mark.parametrize("row", SCHEDULES, ids=name_of)
def test_the_closed_form_of_the_step_time_is_the_estimators(row: ScheduleRow) -> None:
    plan, profile = row.plan, PROFILES[row.model]
    question = Question(profile, plan.mode, plan.num_gpus, plan.minibatch, 9 * 10**9, SERVER)
    quick = Quick(question, plan.forward_size, plan.backward_size)
    expected = estimate_s(profile, plan, prefetch=False)
    found = quick.step_s(cuts(plan.forward_packs), cuts(plan.backward_packs))
    assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("prefetch", [False, True])
def test_the_clock_and_the_activities_agree(prefetch: bool) -> None:
    for row in SCHEDULES[:6] + SCHEDULES[-6:]:
        profile = PROFILES[row.model]
        times, _ = estimate_events(profile, row.plan, prefetch=prefetch)
        expected = estimate_s(profile, row.plan, prefetch=prefetch)
        assert times.makespan_s == pytest.approx(expected, rel=1e-12)


def test_a_pipeline_of_one_gpu_counts_as_data_parallel() -> None:
    row = next(row for row in SCHEDULES if row.plan.num_gpus == 1)
    profile, other = PROFILES[row.model], replace(row.plan, mode="DP")
    again = replace(row.plan, mode="PP")
    for prefetch in (False, True):
        first = estimate_s(profile, other, prefetch=prefetch)
        assert first == estimate_s(profile, again, prefetch=prefetch)
    assert closed_forms(profile, other) == closed_forms(profile, again)


def test_a_slower_link_to_the_host_makes_the_step_longer() -> None:
    row = SCHEDULES[0]
    slow = replace(SERVER, swap_bytes_per_s=SERVER.swap_bytes_per_s / 2)
    profile = PROFILES[row.model]
    slower = estimate_s(profile, row.plan, prefetch=False, server=slow)
    assert slower > estimate_s(profile, row.plan, prefetch=False)


def test_microbatches_that_do_not_come_out_even_are_estimated_too() -> None:
    profile = PROFILES["gpt2_xl"]
    packs = (Pack(0, 26), Pack(26, 52))
    plan = FourTuple("PP", 2, 7, 3, packs[:1], 2, packs)
    _, moved = estimate_events(profile, plan, prefetch=False)
    assert moved == closed_forms(profile, plan)


def test_regrouped_microbatches_wait_for_their_last_sample() -> None:
    assert covering([4, 4], [2, 2, 2, 2]) == [0, 0, 1, 1]
    assert covering([3, 3], [4, 2]) == [1, 1]
    assert covering([2, 2, 2, 1], [5, 2]) == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_gpus": 3, "mode": "DP"}, "no equal shares"),
        ({"forward_size": 65}, "microbatches of"),
        ({"forward_packs": (Pack(0, 20),)}, "FORWARD packs end at layer 20"),
        ({"backward_packs": (Pack(0, 26), Pack(27, 52))}, "from layer 26 should follow"),
        ({"backward_packs": (Pack(0, 26), Pack(26, 51))}, "should end at layer 52"),
        ({"num_gpus": 0}, "make no step"),
    ],
)
def test_a_plan_that_does_not_cover_the_model_is_refused(
    change: dict[str, object], message: str
) -> None:
    packs = (Pack(0, 26), Pack(26, 52))
    good = FourTuple("PP", 2, 64, 2, packs[:1], 2, packs)
    plan = replace(good, **change)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        estimate_s(PROFILES["gpt2_xl"], plan, prefetch=False)
    with pytest.raises(PlanError, match=message):
        closed_forms(PROFILES["gpt2_xl"], plan)


def test_sizes_that_were_not_measured_are_refused() -> None:
    packs = (Pack(0, 26), Pack(26, 52))
    plan = FourTuple("PP", 2, 64, 16, packs[:1], 16, packs)
    with pytest.raises(PlanError, match="measured for microbatches of 1 to 9 samples, not of 16"):
        peak_nbytes(PROFILES["gpt2_xl"], plan)
