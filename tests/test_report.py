"""The report: figures appear in it, plain where it is piped, and in the files it writes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import harmony
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.schedule import parse_instruction
from harmony.planner.ir.tasks import Phase
from harmony.report.metrics import metrics_of, packs_of
from harmony.report.session import ModelRecord, register
from harmony.report.text import PLAIN_WIDTH, print_report, write_report
from tests.synthetic import MIB, PACKS, make_plan, make_record, make_schedule, make_timeline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def text_of(record: ModelRecord) -> str:
    file = io.StringIO()
    print_report([record], file)
    return file.getvalue()


def test_a_piped_report_has_no_control_codes_and_fits_its_width() -> None:
    text = text_of(make_record())
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert max(len(line) for line in lines) <= PLAIN_WIDTH
    assert all(line == line.rstrip() for line in lines)


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    file = Terminal()
    print_report([make_record()], file)
    assert "\x1b[" in file.getvalue()


def test_the_figures_appear() -> None:
    text = text_of(make_record())
    for expected in (
        "Harmony · GPT",
        "50.4 M",
        "6.0x the memory of all GPUs",
        "Harmony-PP",
        "2 microbatches of 4 samples",
        "F[0:3] F[6:9] F[12:15] | B[12:15] B[6:9] B[0:3]",
        "1.10 s measured (median), 1.00 s predicted (+10.0%)",
        "20 steps, loss 5.5000 -> 3.6000",
        "7.273 samples/s",
        "465 tokens/s",
        "812 MiB of 100 GiB",
        "75%",
        "the host issuing work 25%",
        "51.0 of 64.0 MiB",
        "MiB a step over each link",
        " 246 ",
        " 77.0 ",
        "Bottleneck: issuing work from the host.",
        "larger microbatches need fewer tasks.",
    ):
        assert expected in text, expected


def test_a_terminal_without_these_characters_still_gets_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    with path.open("w", encoding="ascii") as file:
        print_report([make_record()], file)
    assert "Bottleneck" in path.read_text(encoding="ascii")


def test_before_any_step_the_report_is_what_is_expected() -> None:
    record = make_record(steps=0)
    text = text_of(record)
    assert "1.00 s predicted; none has run" in text
    assert "GPUs as predicted" in text
    figures = metrics_of(record)
    assert (figures.step_s, figures.samples_per_s, figures.error_percent) == (None, None, None)


def test_one_gpu_has_one_row_a_link() -> None:
    text = text_of(make_record(num_gpus=1))
    assert "on 1 GPU," in text
    assert "gpu0 h2d" not in text
    assert "host to GPU" in text
    assert "GPU to GPU" not in text


def test_many_gpus_have_their_sum_only() -> None:
    text = text_of(make_record(num_gpus=6))
    assert "gpu5 h2d" not in text
    assert " 738 " in text


def test_the_same_packs_on_every_gpu_are_printed_once() -> None:
    record = register("GPT", {})
    schedule = make_schedule(2)
    same = replace(schedule, programs=(schedule.programs[0],) * 2)
    record.planned(make_plan(2, mode="dp", schedules={Phase.TRAIN: same}), make_timeline())
    text = text_of(record)
    assert text.count("F[0:3]") == 1
    assert "Harmony-DP" in text


def test_very_many_packs_are_shortened() -> None:
    program = [parse_instruction(f"compute Run F[{i}:{i + 1}]@0:1 () ->") for i in range(100)]
    text = packs_of(program)
    assert text.startswith("F[0:1] F[1:2]")
    assert text.endswith("F[99:100]")
    assert "85 more" in text
    assert text.count("F[") == 15


def test_warnings_are_shown() -> None:
    record = make_record()
    record.warn("host memory could not be pinned")
    assert "host memory could not be pinned" in text_of(record)


def test_virtual_gpus_that_share_cores_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert "the virtual GPUs share 1 core" in text_of(make_record(2))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert "share" not in text_of(make_record(2))


def test_a_narrow_terminal_loses_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    print_report([make_record()], file)
    assert "…" not in file.getvalue()
    assert max(len(line) for line in file.getvalue().splitlines()) <= 80


def test_a_model_without_a_plan_is_left_out() -> None:
    record = register("Unused", {})
    assert text_of(record) == ""
    with pytest.raises(ValueError, match="no plan"):
        metrics_of(record)


def test_text_file(tmp_path: Path) -> None:
    record = make_record()
    write_report([record], tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == text_of(record)


def test_json_file_has_every_figure(tmp_path: Path) -> None:
    write_report([make_record()], tmp_path / "report.json")
    (model,) = json.loads((tmp_path / "report.json").read_text())["models"]
    assert model["name"] == "GPT"
    assert model["step_s"] == 1.1
    assert model["traffic_nbytes"]["h2d"] == {"weights": 246 * MIB, "inputs": 8192}
    assert [gpu["peak_nbytes"] for gpu in model["gpus"]] == [51 * MIB] * 2
    assert model["gpus"][0]["busy_s"] == pytest.approx(0.825)


def test_trace_file_has_both_steps(tmp_path: Path) -> None:
    write_report([make_record()], tmp_path / "step.trace.json")
    events = json.loads((tmp_path / "step.trace.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["GPT predicted", "GPT measured"]


def test_a_file_that_cannot_be_written_raises(tmp_path: Path) -> None:
    with pytest.raises(harmony.ConfigError, match="missing"):
        write_report([make_record()], tmp_path / "missing" / "report.txt")


def test_the_report_says_what_is_kept_instead_of_recomputed() -> None:
    spec = replace(make_plan().spec, saved=PACKS[:3])
    policy = Policy(hold=2, offload=PACKS[:2], resident=PACKS[3:5])
    record = make_record()
    assert record.run is not None
    record.run.plan = make_plan(spec=spec, policy=policy)
    text = " ".join(text_of(record).split())
    assert "activations of 1 pack on the GPUs and 2 packs on the host" in text
    assert "weights of up to 2 packs a GPU until the backward" in text
    assert "weights of 2 packs from step to step" in text


def test_importing_draws_no_number_of_the_scripts_own() -> None:
    """rich draws from Python's generator when it is imported."""
    code = (
        "import random; random.seed(1); wanted = random.getstate();"
        "import sys, harmony; harmony.Harmony;"
        "assert 'rich.style' in sys.modules and random.getstate() == wanted"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
