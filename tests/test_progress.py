"""Progress: plain lines are rare, the line on a terminal makes room for the script's output."""

from __future__ import annotations

import io
import sys

import pytest

from harmony.cli.progress import PLAIN_S, Progress, describe
from harmony.core.timeline import Timeline
from harmony.report.session import ModelRecord, StepStats

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
    assert describe(stats(12), 67) == (
        "step 12  loss 2.5  16 samples/s  1024 tokens/s  500 ms a step  1:07"
    )
    bare = StepStats(0, None, 8, None, 0.0, Timeline())
    assert describe(bare, 0) == "step 0  0 s a step  0:00"


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
