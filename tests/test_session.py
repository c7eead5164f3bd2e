"""What a session collects from models, in bounded memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from harmony.core.options import Options, current_options
from harmony.core.timeline import Timeline
from harmony.report import session
from harmony.report.session import KEPT_RUNS, KEPT_STEPS, ModelRecord, StepStats
from tests.synthetic import make_plan, make_timeline


def stats(step: int, step_s: float = 1.0, loss: float | None = None) -> StepStats:
    return StepStats(step, loss, 8, 512, step_s, Timeline(step_s=step_s))


def record_with_plan() -> ModelRecord:
    record = session.register("GPT", {"parameters": "50 M"})
    record.planned(make_plan(), make_timeline())
    return record


def test_without_harmony_run_the_options_are_the_defaults_and_nothing_is_kept() -> None:
    assert current_options() == Options()
    assert not current_options().active
    session.register("GPT", {})
    assert session.records() == []


def test_a_session_has_its_options_and_records_until_it_ends() -> None:
    with session.running(Options(gpus=2, active=True)):
        record = session.register("GPT", {})
        assert current_options().gpus == 2
        assert session.records() == [record]
        with session.running(Options(active=True)):
            assert session.records() == []
        assert session.records() == [record]
    assert current_options() == Options()


def test_a_session_ends_when_the_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), session.running(Options(mode="dp")):
        raise ZeroDivisionError
    assert current_options().mode == "auto"


def test_activate_and_deactivate() -> None:
    session.activate(Options(report=Path("x"), active=True))
    session.register("GPT", {})
    session.deactivate()
    assert current_options() == Options()
    assert session.records() == []


def test_the_median_leaves_out_the_first_step_which_warms_up() -> None:
    record = record_with_plan()
    assert record.run is not None
    assert record.run.median_s() is None
    record.stepped(stats(0, 60.0))
    assert record.run.median_s() == 60.0
    for step, seconds in enumerate((1.0, 9.0, 2.0), 1):
        record.stepped(stats(step, seconds))
    assert record.run.median_s() == 2.0


def test_a_long_run_is_kept_in_bounded_memory() -> None:
    record = record_with_plan()
    for step in range(KEPT_STEPS + 500):
        record.stepped(stats(step, step, loss=step))
    assert record.run is not None
    assert record.num_steps == record.run.num_steps == KEPT_STEPS + 500
    assert len(record.run.durations_s) == KEPT_STEPS
    assert (record.first_loss, record.last_loss) == (0, KEPT_STEPS + 499)
    assert record.run.last is not None
    assert record.run.last.step_s == KEPT_STEPS + 499


def test_losses_that_are_not_known_or_not_finite_do_no_harm() -> None:
    record = record_with_plan()
    record.stepped(stats(0))
    assert record.first_loss is None
    record.stepped(stats(1, loss=math.nan))
    assert record.first_loss is not None and math.isnan(record.first_loss)


def test_steps_count_for_the_plan_they_ran_under() -> None:
    record = session.register("GPT", {})
    usual, last_batch = make_plan(), make_plan(minibatch=4)
    for _ in range(3):
        record.planned(usual, make_timeline())
        for step in range(5):
            record.stepped(stats(step))
        record.planned(last_batch, make_timeline())
        record.stepped(stats(5, 0.5))
    assert [(run.plan.minibatch, run.num_steps) for run in record.runs] == [(8, 15), (4, 3)]
    assert record.run is not None
    assert record.run.plan is usual, "the report is about the plan that ran most"
    assert record.plan is last_batch, "while this one is in use"
    assert record.schedule is last_batch.schedule


def test_plans_that_ran_least_are_forgotten() -> None:
    record = session.register("GPT", {})
    plans = [make_plan(minibatch=size) for size in range(1, 3 * KEPT_RUNS)]
    for plan in plans:
        record.planned(plan, make_timeline())
        record.stepped(stats(0, step_s=plan.minibatch))
    assert len(record.runs) == KEPT_RUNS
    assert record.plan is plans[-1]
    assert plans[-2] in [run.plan for run in record.runs]
    assert plans[0] not in [run.plan for run in record.runs]


def test_a_step_without_a_plan_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="planned"):
        session.register("GPT", {}).stepped(stats(0))


def test_plan_only_ends_the_script_past_its_except_exception() -> None:
    with session.running(Options(plan_only=True, active=True)):
        record = session.register("GPT", {})
        with pytest.raises(session.PlanOnly) as caught:
            record.planned(make_plan(), make_timeline())
        assert caught.value.record is record
        assert not isinstance(caught.value, Exception)
        assert record.plan is not None


def test_warnings_are_said_once() -> None:
    record = session.register("GPT", {})
    record.warn("slow")
    record.warn("slow")
    assert record.warnings == ["slow"]


def test_observers_hear_of_plans_and_steps_until_the_session_ends() -> None:
    heard: list[str] = []

    class Listener(session.Observer):
        def planned(self, record: ModelRecord) -> None:
            heard.append(f"plan of {record.name}")

        def stepped(self, record: ModelRecord, stats: StepStats) -> None:
            heard.append(f"step {stats.step}")

    with session.running(Options(active=True)):
        session.observe(Listener())
        record = record_with_plan()
        record.stepped(stats(0))
    record.stepped(stats(1))
    assert heard == ["plan of GPT", "step 0"]


def test_what_happens_is_logged_and_nothing_is_printed_by_itself(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("DEBUG", logger="harmony"):
        record_with_plan().stepped(stats(0))
        session.say("resumed")
    assert [entry.levelname for entry in caplog.records] == ["INFO", "DEBUG", "WARNING"]
    assert caplog.messages[0] == "GPT: planned, 1.00 s a step expected"
    assert capsys.readouterr() == ("", "")
