"""The report as a page: whole by itself, readable without scripts, and what its script draws."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harmony.cli import main as cli
from harmony.errors import ConfigError
from harmony.planner.ir.plan import Decision
from harmony.planner.search.search import choose
from harmony.report.memory import memory_of
from harmony.report.page import SPAN_KINDS, page
from harmony.report.plan_view import PlanView
from harmony.report.text import FORMS, write_report
from tests.synthetic import make_plan, make_record, make_timeline
from tests.toys import MIB, chain, server, uniform_costs

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements of a page: their names, text, attributes; every one is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    @property
    def drawn(self) -> list[Any]:
        return list(json.loads(self.texts["script"][0]))


def report_of(tmp_path: Path, **changes: Any) -> Page:
    record = make_record()
    assert record.run is not None
    record.run.plan = replace(record.run.plan, **changes)
    record.warn("a <warning>")
    write_report([record], tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    shown = report_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"
    loads = {"src", "href", "srcset", "action", "data"}
    assert not any(loads & set(attributes) for _, attributes in shown.found)
    assert "default-src 'none'" in text
    assert "{{" not in text and len(text) < 60_000


def test_what_was_expected_stands_beside_what_was_measured(tmp_path: Path) -> None:
    shown = report_of(tmp_path)
    cells = shown.texts["td"]
    at = cells.index("step")
    assert cells[at + 1 : at + 3] == ["1.00 s", "1.10 s"]
    at = cells.index("gpu0 peak memory")
    assert cells[at + 1] == "51.0 of 64.0 MiB"
    assert "Predicted and measured" in shown.texts["h2"]
    assert "a <warning>" in " ".join(shown.texts["p"]), "text of others is no markup"
    assert any("Bottleneck: " in text for text in shown.texts["strong"])
    assert "host to GPU" in cells


def test_every_span_of_both_steps_is_drawn(tmp_path: Path) -> None:
    (drawn,) = report_of(tmp_path).drawn
    assert [step["name"] for step in drawn["steps"]] == ["measured", "predicted"]
    timeline = make_timeline()
    lanes = {lane["name"]: lane["spans"] for lane in drawn["steps"][1]["lanes"]}
    assert sum(map(len, lanes.values())) == len(timeline.spans)
    assert list(lanes)[:2] == ["gpu0.compute", "gpu0.h2d"] and list(lanes)[-1] == "host.update"
    start, length, kind, label, nbytes = lanes["gpu0.h2d"][0]
    assert (start, length, nbytes) == (0.0, 0.25, 123 * MIB)
    assert (SPAN_KINDS[kind], drawn["labels"][label]) == ("weights", "SwapIn W[0:3]")


def test_the_decisions_are_there_with_what_else_there_was(tmp_path: Path) -> None:
    decisions = (Decision("mode", "pp", "it moves less", (("dp", 1.25), ("dp+pp", "no room"))),)
    shown = report_of(tmp_path, decisions=decisions)
    assert "dp: 1.25 s a step (+25.0%)" in shown.texts["li"]
    assert "dp+pp: no room" in shown.texts["li"]
    assert "mode" in shown.texts["strong"]


def test_the_timeline_can_be_used_without_a_mouse(tmp_path: Path) -> None:
    shown = report_of(tmp_path)
    (svg,) = [attributes for tag, attributes in shown.found if tag == "svg"]
    assert svg["tabindex"] == "0" and "Arrows choose" in str(svg["aria-label"])
    buttons = [attributes for tag, attributes in shown.found if tag == "button"]
    assert len(buttons) == 5 and all(button["aria-label"] for button in buttons)


def test_memory_over_the_step_has_the_peak_of_the_plan() -> None:
    graph = chain(12, weight=MIB, per_sample=MIB)
    costs, machine = uniform_costs(graph), server(2, memory=24 * MIB)
    plan = choose(graph, costs, machine, 8)
    memory = memory_of(plan, graph, costs)
    timeline = make_timeline()
    view = PlanView("Toy", plan, timeline, memory=memory)
    (drawn,) = Page(page([(view, None, None)])).drawn
    for gpu, shown in enumerate(drawn["memory"]):
        assert max(nbytes for _, nbytes in shown["points"]) == plan.peak_nbytes[gpu]
        assert sum(memory.gpus[gpu].values()) == plan.peak_nbytes[gpu]
        times = [seconds for seconds, _ in shown["points"]]
        assert times == sorted(times)
    assert sum(memory.host.values()) == plan.host_nbytes


def test_a_plan_has_the_same_page() -> None:
    view = PlanView("Net", make_plan(), make_timeline())
    shown = Page(page([(view, None, None)]))
    assert shown.texts["title"] == ["Plan · Net · Harmony"]
    assert "Figures" in shown.texts["h2"]
    assert [step["name"] for step in shown.drawn[0]["steps"]] == ["predicted"]


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.htm"])
def test_an_ending_that_says_nothing_is_refused_before_training(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it ran')")
    assert cli.main([str(script), "--report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert all(ending in error for ending in FORMS)
    with pytest.raises(ConfigError, match="the ending says"):
        write_report([make_record()], tmp_path / name)
