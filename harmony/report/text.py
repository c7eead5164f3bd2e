"""The profiler report: what one model's training did, in a terminal or in a file.

`render` makes a rich renderable, `print_report` prints it in a terminal or as plain text of 100
columns. `write_report` writes what the ending of the path says (`FORMS`).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from harmony.core.files import write_text
from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes, format_seconds
from harmony.errors import ConfigError
from harmony.report.memory import MemoryUse, memory_of
from harmony.report.metrics import (
    BOTTLENECKS,
    KINDS,
    LINK_NAMES,
    LINKS,
    STALL_NAMES,
    GpuMetrics,
    Metrics,
    metrics_of,
    of_limit,
)
from harmony.report.page import page
from harmony.report.plan_view import PlanView, view_of
from harmony.report.session import ModelRecord
from harmony.report.trace_file import trace_events

PLAIN_WIDTH = 100
"""Columns of a report that goes to a file or a pipe."""

_ASCII = str.maketrans("─━█░·", "--#.-")

FORMS = {
    ".txt": "the text of the terminal",
    ".html": "a page with the timeline",
    ".json": "all figures",
    ".trace.json": "the predicted and the measured step for Perfetto",
}
"""What the endings of a report's file mean."""

JSON_VERSION = 1
"""Of ``.json``: ``{"format": "harmony-report", "version": 1, "models": [...]}``, where a model has
the fields of `harmony.report.metrics.Metrics` and ``traffic_nbytes``, the sum over its GPUs."""

GPUS_IN_TRAFFIC = 4
"""With more GPUs than this the traffic table shows their sum only."""


def render(record: ModelRecord) -> RenderableType:
    """Return the report of a model for a rich console.

    Raises:
        ValueError: if it has no plan yet.
    """
    figures = metrics_of(record)
    parts: list[RenderableType] = [
        Rule(Text(f"Harmony · {figures.name}", style="bold"), characters="─", align="left"),
        _summary(figures),
        _gpu_table(figures),
        _traffic_table(figures),
        _conclusion(figures),
    ]
    return Group(*parts)


def print_report(records: Sequence[ModelRecord], file: TextIO | None = None) -> None:
    """Print the report of each model that has a plan; plain text unless ``file`` is a terminal.

    Args:
        records: models.
        file: where to; default: standard output.
    """
    stream = sys.stdout if file is None else file
    for record in (record for record in records if record.runs):
        print_parts([Text(), render(record)], stream)


def print_parts(parts: Sequence[RenderableType], stream: TextIO) -> None:
    """Print one after the other; plain text of `PLAIN_WIDTH` columns unless to a terminal."""
    if stream.isatty():
        Console(file=stream, highlight=False).print(*parts, sep="\n")
    else:
        stream.write(_plain(Group(*parts), stream.encoding))


def write_report(records: Sequence[ModelRecord], path: Path) -> None:
    """Write the report of each model that has a plan; the ending of ``path`` chooses the form.

    Raises:
        ConfigError: for another ending than those of `FORMS`.
        HarmonyError: if it cannot be written.
    """
    ready = [record for record in records if record.runs]
    form = form_of(path)
    if form == ".trace.json":
        text = json.dumps(trace_events(*_timelines(ready)))
    elif form == ".json":
        models = [metrics_of(record).to_json() for record in ready]
        found = {"format": "harmony-report", "version": JSON_VERSION, "models": models}
        text = json.dumps(found, indent=2)
    elif form == ".html":
        text = page([_shown(record) for record in ready])
    else:
        file = io.StringIO()
        print_report(ready, file)
        text = file.getvalue()
    write_text(text, path, "the report")


def form_of(path: Path) -> str:
    """Return the key of `FORMS` that a file's name ends in.

    Raises:
        ConfigError: if it ends otherwise.
    """
    found = [ending for ending in FORMS if path.name.endswith(ending)]
    if not found:
        known = ", ".join(f"{ending}: {what}" for ending, what in FORMS.items())
        raise ConfigError(f"--report {path}: the ending says what is written. {known}")
    return max(found, key=len)


def _shown(record: ModelRecord) -> tuple[PlanView, Metrics | None, Timeline | None]:
    run = record.run
    last = None if run is None else run.last
    planned_only = record.num_steps == 0
    view = view_of(record, profiled=planned_only)
    return view, None if last is None else metrics_of(record), last


class Bar:
    """A horizontal bar of a fixed width; ``#`` where the terminal has no blocks.

    Args:
        share: filled part, cut to 0 to 1.
        style: colour of the filled part.
        width: columns.
    """

    def __init__(self, share: float, style: str, width: int = 10) -> None:
        self.filled = round(min(max(share, 0.0), 1.0) * width)
        self.style = style
        self.width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", ".") if options.ascii_only else ("█", "░")
        yield Segment(full * self.filled, Style.parse(self.style))
        yield Segment(empty * (self.width - self.filled), Style.parse("dim"))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.width, self.width)


def _plain(report: RenderableType, encoding: str | None) -> str:
    """The report without control codes, in characters that ``encoding`` has."""
    memory = io.StringIO()
    console = Console(
        file=memory, width=PLAIN_WIDTH, force_terminal=False, color_system=None, highlight=False
    )
    console.print(report)
    text = "".join(f"{line.rstrip()}\n" for line in memory.getvalue().splitlines())
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode("ascii", "replace").decode("ascii")
    return text


def _timelines(
    records: Sequence[ModelRecord],
) -> tuple[dict[str, Timeline], dict[str, MemoryUse]]:
    found: dict[str, Timeline] = {}
    memory: dict[str, MemoryUse] = {}
    for index, record in enumerate(records):
        run = record.run
        if run is None:
            continue
        name = record.name if len(records) == 1 else f"{record.name} {index}"
        found[f"{name} predicted"] = run.predicted
        if run.last is not None:
            found[f"{name} measured"] = run.last
        if run.layers is not None:
            use = memory_of(run.plan, *run.layers)
            memory |= {f"{name} {kind}": use for kind in ("predicted", "measured")}
    return found, memory


def _summary(figures: Metrics) -> RenderableType:
    """Labels and values: the model, the plan, what training achieved."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, value in figures.facts.items():
        grid.add_row(label, value)
    for label, value in figures.in_words().items():
        grid.add_row(label, value)
    if figures.num_plans > 1:
        grid.add_row("plans", f"{figures.num_plans} were used; this is the one that ran most")
    grid.add_row("step", _step_text(figures))
    if figures.num_steps:
        grid.add_row("training", _training_text(figures))
    grid.add_row("host memory", _host_text(figures))
    for warning in figures.warnings:
        grid.add_row(Text("warning", style="bold yellow"), warning)
    return Padding(grid, (0, 0, 1, 0))


def _step_text(figures: Metrics) -> Text:
    predicted = f"{format_seconds(figures.predicted_step_s)} predicted"
    if figures.step_s is None:
        return Text(f"{predicted}; none has run")
    text = Text(f"{format_seconds(figures.step_s)} measured", style="bold")
    text.append(f" (median), {predicted}", style="not bold")
    if figures.error_percent is not None:
        close = abs(figures.error_percent) <= 15
        text.append(f" ({figures.error_percent:+.1f}%)", style="green" if close else "yellow")
    if figures.shared_cores:
        cores = "1 core" if figures.shared_cores == 1 else f"{figures.shared_cores} cores"
        text.append(f"; the virtual GPUs share {cores} with all else that runs")
    return text


def _training_text(figures: Metrics) -> str:
    steps = "1 step" if figures.num_steps == 1 else f"{figures.num_steps} steps"
    if figures.num_batches > figures.num_steps:
        steps += f" of {figures.num_batches} batches (the figures are of one batch)"
    parts = [steps]
    if figures.first_loss is not None and figures.last_loss is not None:
        parts.append(f"loss {figures.first_loss:.4f} -> {figures.last_loss:.4f}")
    if figures.samples_per_s is not None:
        parts.append(f"{figures.samples_per_s:.4g} samples/s")
    if figures.tokens_per_s is not None:
        parts.append(f"{figures.tokens_per_s:,.0f} tokens/s")
    return ", ".join(parts)


def _host_text(figures: Metrics) -> str:
    used = of_limit(figures.host_nbytes, figures.host_limit_nbytes)
    parts = [f"{kind} {format_bytes(nbytes)}" for kind, nbytes in figures.host_parts.items()]
    what = f" ({', '.join(parts)})" if parts else ""
    return f"{used}{what}; its update thread works {format_seconds(figures.host_update_s)} a step"


def _gpu_table(figures: Metrics) -> RenderableType:
    title = "GPUs in the last step" if figures.measured else "GPUs as predicted"
    table = _table(title)
    table.add_column("", no_wrap=True)
    table.add_column("busy", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("idle, and what for", ratio=1)
    table.add_column("peak memory", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    whole = figures.timeline_s or 1.0
    for index, gpu in enumerate(figures.gpus):
        busy = gpu.busy_s / whole
        used = gpu.peak_nbytes / gpu.limit_nbytes
        style = "green" if used <= 1 else "red"
        table.add_row(
            f"gpu{index}" if gpu.name.endswith(f":{index}") else f"gpu{index} {gpu.name}",
            Bar(busy, "green" if busy >= 0.75 else "yellow"),
            f"{busy:.0%}",
            _stall_text(gpu.stalls_s, whole),
            Bar(used, style),
            of_limit(gpu.peak_nbytes, gpu.limit_nbytes),
        )
    return table


def _stall_text(stalls_s: dict[str, float], whole: float) -> str:
    ranked = sorted(stalls_s.items(), key=lambda item: -item[1])
    shown = [
        f"{STALL_NAMES.get(cause, cause)} {seconds / whole:.0%}"
        for cause, seconds in ranked
        if seconds > 0.005 * whole
    ]
    return ", ".join(shown) or "-"


def _traffic_table(figures: Metrics) -> RenderableType:
    """Bytes a step over each link: a row a link of each GPU, and their sum."""
    total = figures.traffic_nbytes()
    kinds = [kind for kind in KINDS if any(kind in row for row in total.values())]
    kinds += sorted({kind for row in total.values() for kind in row} - set(KINDS))
    unit, size = _unit(max((sum(row.values()) for row in total.values()), default=0))
    table = _table(f"{unit} a step over each link")
    for name in ("", *kinds, "sum", "in use"):
        table.add_column(name, justify="left" if name == "" else "right")
    many = len(figures.gpus) > GPUS_IN_TRAFFIC
    shown = [] if many or len(figures.gpus) == 1 else list(enumerate(figures.gpus))
    for link in (link for link in LINKS if link in total):
        for index, gpu in shown:
            row = gpu.traffic_nbytes.get(link, {})
            name = f"  gpu{index} {link}"
            cells = _cells(row, kinds, size)
            table.add_row(name, *cells, _in_use(figures, [gpu], link), style="dim")
        cells = _cells(total[link], kinds, size)
        table.add_row(LINK_NAMES[link], *cells, _in_use(figures, figures.gpus, link))
    return table if total else Text("No bytes crossed the links.\n")


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _unit(nbytes: int) -> tuple[str, int]:
    """One unit for a whole table, so that its numbers can be compared at a glance."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= 10 * size:
            return unit, size
    return "KiB", 2**10


def _cells(row: dict[str, int], kinds: Sequence[str], size: int) -> list[str]:
    cells = [_number(row[kind] / size) if kind in row else "-" for kind in kinds]
    return [*cells, _number(sum(row.values()) / size) if row else "-"]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.005 else "<0.01"


def _in_use(figures: Metrics, gpus: Sequence[GpuMetrics], link: str) -> str:
    """How much of the step the links were in use, on average."""
    busy = sum(gpu.link_busy_s[link] for gpu in gpus) / len(gpus)
    return f"{busy / figures.timeline_s:.0%}" if figures.timeline_s else "-"


def _conclusion(figures: Metrics) -> RenderableType:
    bound = BOTTLENECKS.get(figures.bound, figures.bound)
    return Text.assemble(("Bottleneck: ", "bold"), f"{bound}. {figures.advice}")
