"""A plan as text: its figures, the picture of its timeline, its explanation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harmony.core.machine import Device, Machine
from harmony.core.timeline import Span, Timeline
from harmony.planner.ir.plan import Decision, describe_spec
from harmony.profiling.analytic import LayerWork, Work, WorkTable
from harmony.report.plan_view import (
    PlanView,
    ascii_only,
    explanation,
    peak_share,
    view_json,
    view_text,
)
from harmony.report.timeline_text import COLUMNS, WIDTH, picture
from tests.synthetic import make_plan, make_timeline

OTHERS = (("dp over 2 replicas", 1.25), ("pp, more packs", "needs 70 MiB of 64 MiB"))
DECISIONS = (Decision("mode", "pp", "it moves less", (("dp", 1.25), ("dp+pp", "too few GPUs"))),)
PLAN = make_plan(
    alternatives=OTHERS, bound_s=0.5, bound_reason="compute alone", decisions=DECISIONS
)
VIEW = PlanView("GPT", PLAN, make_timeline(), costs_from="measured", machine_notes=("a note",))


def lines_by_label(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    label = ""
    for line in lines:
        label = line[:12].strip() or label
        found[label] = f"{found.get(label, '')} {line[12:].strip()}".strip()
    return found


def test_the_head_says_what_the_plan_does_and_why() -> None:
    lines = view_text(VIEW)
    assert lines[0] == "Plan · GPT on vgpu:0, vgpu:1, minibatch 8"
    found = lines_by_label(lines)
    assert found["step"] == "1.00 s, 8 samples/s"
    assert found["limit"] == (
        "no plan can take less than 500 ms (compute alone); this one takes 2.00 times that"
    )
    assert found["bottleneck"] == "the links from the host to the GPUs. A larger minibatch helps."
    assert found["runner-up"] == "dp over 2 replicas: 1.25 s a step, 25.0% slower"
    assert (found["costs"], found["machine"]) == ("measured", "a note")
    assert max(map(len, lines)) <= WIDTH


def test_of_the_runner_up_only_what_differs_is_shown() -> None:
    what = describe_spec(PLAN.spec, replace(PLAN.policy, lookahead=4))
    second = replace(VIEW, plan=replace(PLAN, alternatives=((what, 1.1),)))
    found = lines_by_label(view_text(second))
    assert found["runner-up"] == "with lookahead 4: 1.10 s a step, 10.0% slower"
    alone = lines_by_label(view_text(replace(VIEW, plan=replace(PLAN, alternatives=()))))
    assert alone["runner-up"] == "no other plan was looked at"


def test_in_a_loop_of_ones_own_a_step_is_its_forward_and_its_backward() -> None:
    view = replace(VIEW, forward_s=0.25)
    found = lines_by_label(view_text(view))
    assert found["step"] == "1.25 s (forward 250 ms, backward 1.00 s, shown below), 6.4 samples/s"
    assert "takes 2.50 times" in found["limit"]
    assert view_json(view)["step_s"] == 1.25


def test_every_gpu_and_the_host_have_a_line() -> None:
    lines = view_text(VIEW)
    rows = [line for line in lines if line.startswith(("gpu0 ", "gpu1 ", "host "))][:3]
    assert "75%  51.0 MiB of 64.0 MiB" in rows[0]
    assert " ".join(rows[2].split()) == "host 812 MiB of 100 GiB updates 50.0 ms a step"


def test_traffic_is_shown_by_link_and_kind() -> None:
    lines = view_text(VIEW)
    at = next(i for i, line in enumerate(lines) if "a step  " in line)
    assert lines[at].split()[3:] == [
        "weights", "gradients", "stash", "activations", "inputs", "sum", "in", "use",
    ]  # fmt: skip
    rows = {line.split()[0]: line.split()[1:] for line in lines[at + 1 : at + 4]}
    assert rows["h2d"] == ["246.00", "-", "-", "-", "0.01", "246.01", "30%"]
    assert rows["p2p"][3] == "6.00"


def test_the_share_of_the_peak_is_shown_where_flops_and_gpu_are_known() -> None:
    one = LayerWork(Work({"bf16": 1e12}), Work({"bf16": 2e12}))
    work = WorkTable(({4: one},))
    assert peak_share(VIEW) is None
    assert peak_share(replace(VIEW, work=work)) is None
    devices = tuple(Device("RTX 4090", 64 * 2**20, 8e9, 8e9, 8e9) for _ in range(2))
    plan = replace(PLAN, machine=Machine(devices, PLAN.machine.host))
    known = replace(VIEW, work=work, plan=plan)
    share = peak_share(known)
    assert share is not None
    # Two microbatches of 4 samples a step of 1 s, on two GPUs.
    assert share.model_flops == 6e12
    assert share.share == pytest.approx(3e12 / 165.2e12)
    assert "2% of peak (3 of 165.2 TFLOP/s a GPU, dense bf16)" in " ".join(view_text(known))


def test_the_picture_has_a_line_a_stream_and_a_column_for_each_part_of_the_step() -> None:
    lines = picture(make_timeline())
    assert lines[0].endswith("1.00 s")
    assert len(lines[0]) == 14 + COLUMNS
    compute = next(line for line in lines if line.startswith("gpu0  compute"))[14:]
    # A quarter nothing, a quarter forward, half backward.
    assert compute[: COLUMNS // 4].strip() == ""
    assert compute.count("F") == pytest.approx(COLUMNS / 4, abs=1)
    assert compute.count("b") == pytest.approx(COLUMNS / 2, abs=1)
    h2d = next(line for line in lines if line.split()[0] == "h2d")[14:]
    assert h2d.startswith("w" * 18)
    assert [line.split()[0] for line in lines if line[:1] != " "][:3] == ["gpu0", "gpu1", "host"]
    assert "F forward, B backward, U update" in lines[-2] + lines[-1]


def test_packs_alternate_in_case_and_short_work_is_a_dot() -> None:
    spans = [
        Span("gpu0.compute", "Run F[0:2]@0:4", "forward", 0.0, 0.25, 0, 0),
        Span("gpu0.compute", "Run F[0:2]@4:8", "forward", 0.25, 0.5, 0, 1),
        Span("gpu0.compute", "Run F[2:4]@0:4", "forward", 0.5, 0.75, 0, 2),
        Span("gpu0.d2h", "SwapOut X2@0:4", "stash", 0.5, 0.501, 9, 3),
    ]
    lines = picture(Timeline(spans, 1.0), columns=8)
    assert lines[1] == "gpu0  compute FFFFff"
    assert lines[2] == "      d2h         ·"


def test_gpus_come_in_the_order_of_their_numbers() -> None:
    spans = [Span(f"gpu{i}.compute", "Run F[0:1]@0:1", "forward", 0, 1, 0, 0) for i in range(12)]
    names = [line.split()[0] for line in picture(Timeline(spans, 1.0))[1:13]]
    assert names == [f"gpu{i}" for i in range(12)]


def test_a_step_in_which_nothing_runs_has_a_picture_too() -> None:
    assert picture(Timeline()) == ["Nothing runs."]


def test_there_is_an_ascii_form() -> None:
    lines = ascii_only(view_text(VIEW))
    assert all(line.isascii() for line in lines)
    assert not any("?" in line for line in lines)


def test_the_explanation_names_each_decision_and_its_alternatives() -> None:
    lines = explanation(PLAN)
    assert "mode: pp; it moves less" in lines
    assert "  - dp: 1.25 s a step (+25.0%)" in lines
    assert "  - dp+pp: too few GPUs" in lines
    assert "  - pp, more packs: needs 70 MiB of 64 MiB" in lines
    assert lines[1:] == view_text(VIEW, explain=True)[-len(lines) + 1 :]


def test_alternatives_are_compared_with_the_whole_step_where_a_plan_is_a_part_of_it() -> None:
    # The plan's own second is the backward; with the forward a step takes 1.25 s, as dp does.
    assert "  - dp: 1.25 s a step (+0.0%)" in explanation(PLAN, 1.25)
    whole = view_text(replace(VIEW, forward_s=0.25), explain=True)
    assert "  - dp: 1.25 s a step (+0.0%)" in whole


def test_json_has_what_the_text_shows() -> None:
    data = json.loads(json.dumps(view_json(VIEW, explain=True)))
    assert data["step_s"] == 1.0
    assert data["samples_per_s"] == 8.0
    assert data["lower_bound_s"] == 0.5
    assert data["runner_up"] == {"what": "dp over 2 replicas", "outcome": 1.25}
    assert data["decisions"][0]["alternatives"][0] == ["dp", 1.25]
    assert data["traffic_nbytes"]["h2d"]["weights"] == 246 * 2**20
    assert data["share_of_peak"] is None
    assert "decisions" not in view_json(VIEW)
