"""Progress: plain lines are rare, the line on a terminal makes room for the script's output."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

import harmony
from harmony.cli.progress import Progress
from harmony.core.options import Options
from harmony.core.timeline import Timeline
from harmony.report import session
from harmony.report.progress import PLAIN_S, Pace, describe
from harmony.report.session import ModelRecord, StepStats
from tests.synthetic import make_plan, make_timeline

RECORD = ModelRecord("GPT", {})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stats(step: int) -> StepStats:
    return StepStats(step, 2.5, 8, 512, 0.5, Timeline())


def test_a_step_is_described_in_one_line() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 67
    pace.add(stats(12))
    assert describe(RECORD, stats(12), pace) == (
        "step 12  loss 2.5  16 samples/s  1024 tokens/s  500 ms a step  1:07"
    )
    bare = StepStats(0, None, 8, None, 0.0, Timeline())
    assert describe(RECORD, bare, Pace(clock)) == "step 0  0 s a step  0:00"


def test_the_time_left_counts_what_lies_between_steps_and_not_what_was_before_a_resume() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.left_s(100) is None
    for step in (40, 41, 42):
        clock.now += 90
        pace.add(stats(step))
    assert pace.left_s(100) == 57 * 90 and pace.left_s(43) == 0
    assert pace.left_s(None) is None and pace.left_s(42) is None
    planned = ModelRecord("GPT", {}, total_steps=100)
    planned.planned(make_plan(), make_timeline(2, 0.5))
    assert planned.plan is not None
    line = describe(planned, StepStats(42, 2.5, 8, None, 0.5, make_timeline(2, 0.5)), pace)
    assert line.startswith("step 43/100  loss 2.5") and line.endswith("4:30, 1:25:30 left")
    assert f"{planned.plan.step_s / 0.5:.0%} of the plan's speed" in line


def test_a_models_own_line_is_drawn_over_on_a_terminal_and_rare_in_a_log() -> None:
    for stream in (Terminal(), io.StringIO()):
        clock = Clock()
        line = harmony.Progress(20, stream, clock)
        for step in range(20):
            clock.now += 1
            line.stepped(ModelRecord("GPT", {}), stats(step))
        shown = stream.getvalue()
        assert "step 20/20" in shown and shown.endswith("\n")
        if stream.isatty():
            assert shown.count("\r") == 20 and "step 2/20" in shown
        else:
            assert shown.count("\n") == 1, "the last"
    for wrong in (0, -1, "20"):
        with pytest.raises(harmony.ConfigError, match="how many steps"):
            harmony.Progress(wrong)  # type: ignore[arg-type]


def test_a_line_that_cannot_be_written_does_not_end_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = Terminal()
    line = harmony.Progress(1, closed)
    closed.close()
    line.stepped(ModelRecord("GPT", {}), stats(0))
    harmony.Progress(1, closed).stepped(ModelRecord("GPT", {}), stats(0))
    monkeypatch.setattr(sys, "stderr", None)
    harmony.Progress(1).stepped(ModelRecord("GPT", {}), stats(0))


def test_harmony_run_has_one_line_which_learns_the_number_of_steps() -> None:
    clock, stream, own = Clock(), Terminal(), Terminal()
    shown = Progress(stream, clock)
    record = ModelRecord("GPT", {})
    with session.running(Options(active=True)):
        line = harmony.Progress(9, own, clock)
        for step in range(3):
            clock.now += 1
            for observer in (line, shown):
                observer.stepped(record, stats(step))
    assert own.getvalue() == "" and "step 3/9" in stream.getvalue()


def test_a_notebook_replaces_the_output_of_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            shown.append(f"again {data['text/plain']}")

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        shown.append(data["text/plain"])
        return Handle()

    notebook = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    clock = Clock()
    line = harmony.Progress(5, clock=clock)
    for step in range(3):
        clock.now += 1
        line.stepped(ModelRecord("GPT", {}), stats(step))
    assert [text.partition("  ")[0] for text in shown] == [
        "step 1/5",
        "again step 2/5",
        "again step 3/5",
    ]


def test_without_a_terminal_lines_are_plain_and_rare() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock)
    for step in range(100):
        clock.now += PLAIN_S / 10
        progress.stepped(RECORD, stats(step))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert all(line.startswith("harmony: step ") for line in lines)
    assert "\x1b" not in stream.getvalue()
    assert progress.next_step == 100


def test_on_a_terminal_the_line_is_erased_before_the_script_prints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(), Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress(stream, clock)
    with progress.around_output():
        clock.now += 1
        progress.stepped(RECORD, stats(0))
        assert "  0:01" in stream.getvalue()
        print("hello")
        assert stream.getvalue().endswith("\r\x1b[2Khello\n")
    assert sys.stdout is stream


def test_an_unfinished_line_of_the_script_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress(stream, clock)
    with progress.around_output():
        print("epoch 1: 50 %", end="")
        clock.now += 1
        progress.stepped(RECORD, stats(0))
        assert stream.getvalue() == "epoch 1: 50 %"
        progress.say("interrupted")
    assert stream.getvalue() == "epoch 1: 50 %\nharmony: interrupted\n"


def test_the_line_is_gone_when_the_block_ends() -> None:
    clock, stream = Clock(), Terminal()
    progress = Progress(stream, clock)
    with pytest.raises(KeyboardInterrupt), progress.around_output():
        clock.now += 1
        progress.stepped(RECORD, stats(0))
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\r\x1b[2K")
