"""The report, or a plan, as one HTML file that needs nothing else.

The tables are HTML already, so that the page can be read, searched and printed without scripts;
the timeline and the memory are drawn from the data in it by the script of ``page.html``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes, format_seconds
from harmony.core.version import __version__
from harmony.planner.ir.plan import describe_spec
from harmony.report.metrics import (
    BOTTLENECKS,
    KINDS,
    LINK_NAMES,
    LINKS,
    STALL_NAMES,
    Metrics,
    of_limit,
)
from harmony.report.plan_view import PlanView, figures, outcome_text, peak_share
from harmony.report.trace_file import lane_order

SPAN_KINDS = ("forward", "backward", "update", "accumulate", *KINDS)
"""In the order of the colours of ``page.html``."""

_HELP = (
    "Arrows choose what is described below, + and - zoom, Page Up and Page Down move, 0 shows "
    "all. Mouse: Ctrl and wheel or a double click zoom, dragging moves."
)


def page(models: Sequence[tuple[PlanView, Metrics | None, Timeline | None]]) -> str:
    """Return the page.

    Args:
        models: for each model its plan, and of steps that ran their figures and the last one.
    """
    names = ", ".join(view.name for view, _, _ in models)
    kind = "Plan" if all(timeline is None for _, _, timeline in models) else "Report"
    data = json.dumps([_drawing(view, last) for view, _, last in models], separators=(",", ":"))
    parts = {
        "title": escape(f"{kind} · {names} · Harmony"),
        "body": "\n".join(_section(*model) for model in models),
        "footer": escape(f"Harmony {__version__}"),
        "data": data.replace("<", "\\u003c"),
    }
    text = files("harmony.report").joinpath("page.html").read_text(encoding="utf-8")
    head, *rest = text.split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        head += parts[name] + after
    return head


# What the script draws


def _drawing(view: PlanView, last: Timeline | None) -> dict[str, Any]:
    """Lanes and memory of the steps, in seconds and bytes; labels by their number."""
    labels: dict[str, int] = {}
    steps = [_step("predicted", view.timeline, labels)]
    if last is not None:
        steps.insert(0, _step("measured", last, labels))
    memory = []
    for gpu, device in enumerate(view.plan.machine.devices[: view.plan.schedule.num_devices]):
        shown = last or view.timeline
        points = [] if view.memory is None else view.memory.over_time(gpu, shown)
        peaks = shown.peak_nbytes
        memory.append(
            {
                "name": f"gpu{gpu}",
                "limit": device.memory_nbytes,
                "peak": peaks[gpu] if peaks else view.plan.peak_nbytes[gpu],
                "points": [[_short(seconds), nbytes] for seconds, nbytes in points],
                "step_s": shown.step_s,
            }
        )
    return {"steps": steps, "memory": memory, "labels": list(labels)}


def _step(name: str, timeline: Timeline, labels: dict[str, int]) -> dict[str, Any]:
    lanes = [
        {
            "name": lane,
            "spans": [
                [
                    _short(span.start_s),
                    _short(span.duration_s),
                    SPAN_KINDS.index(span.kind) if span.kind in SPAN_KINDS else 9,
                    labels.setdefault(span.label, len(labels)),
                    span.nbytes,
                ]
                for span in timeline.on(lane)
            ],
        }
        for lane in sorted(timeline.lanes(), key=lane_order)
    ]
    return {"name": name, "step_s": timeline.step_s, "lanes": lanes}


def _short(seconds: float) -> float:
    return round(seconds, 7)


# What is written


def _section(view: PlanView, measured: Metrics | None, last: Timeline | None) -> str:
    predicted = figures(view)
    plan = view.plan
    gpus = sorted({device.name for device in plan.machine.devices})
    count = plan.machine.num_devices
    where = f"{count} x {', '.join(gpus)}" if len(gpus) == 1 and count > 1 else ", ".join(gpus)
    parts = [
        f"<h1>{escape(view.name)} <small>{escape(where)}, minibatch {plan.minibatch}</small></h1>",
        _conclusion(view, predicted, measured),
        *(f'<p class="says warning">{escape(text)}</p>' for text in view.warnings),
        f"<h2>{'Figures' if measured is None else 'Predicted and measured'}</h2>",
        _figures_table(view, predicted, measured),
        "<h2>Timeline and memory</h2>",
        _timeline(view, last),
        "<h2>Traffic</h2>",
        _traffic(predicted, measured),
        "<h2>Memory by kind</h2>" + _memory(view) if view.memory else "",
        "<h2>The plan</h2>",
        _plan(view),
        _decisions(view),
    ]
    return "\n".join(part for part in parts if part)


def _conclusion(view: PlanView, predicted: Metrics, measured: Metrics | None) -> str:
    found = measured or predicted
    bound = BOTTLENECKS.get(found.bound, found.bound)
    text = f"<strong>Bottleneck: {escape(bound)}.</strong> {escape(found.advice)}"
    if view.plan.bound_s:
        times = view.step_s / view.plan.bound_s
        text += escape(
            f" No plan can take less than {format_seconds(view.plan.bound_s)}"
            f" ({view.plan.bound_reason}); this one is predicted to take {times:.2f} times that."
        )
    return f'<p class="says">{text}</p>'


def _figures_table(view: PlanView, predicted: Metrics, measured: Metrics | None) -> str:
    """One row a figure, a column for what was expected and one for what was seen."""
    both = [predicted] if measured is None else [predicted, measured]
    rows: list[tuple[str, list[str]]] = [("step", [format_seconds(view.step_s)])]
    share = peak_share(view)
    samples = [view.plan.minibatch / view.step_s] if view.step_s else [0.0]
    if measured is not None:
        rows[0][1].append(format_seconds(measured.step_s or measured.timeline_s))
        samples.append(measured.samples_per_s or 0.0)
    rows.append(("samples/s", [f"{rate:.4g}" if rate else "-" for rate in samples]))
    if measured is not None and measured.tokens_per_s:
        tokens = measured.tokens_per_s / samples[1] if samples[1] else 0.0  # of a sample
        rows.append(("tokens/s", [f"{tokens * rate:,.0f}" if tokens else "-" for rate in samples]))
    if share is not None:
        rows.append(("of the GPUs' peak", [f"{share.share:.0%}"]))
    for index in range(len(predicted.gpus)):
        name = f"gpu{index}"
        gpus = [(one.gpus[index], one.timeline_s or 1.0) for one in both]
        rows.append((f"{name} busy", [f"{gpu.busy_s / whole:.0%}" for gpu, whole in gpus]))
        causes = {cause for gpu, _ in gpus for cause in gpu.stalls_s}
        for cause in sorted(causes):
            cells = [gpu.stalls_s.get(cause, 0.0) / whole for gpu, whole in gpus]
            if max(cells) > 0.005:
                rows.append(
                    (
                        f"{name} waits for {STALL_NAMES.get(cause, cause)}",
                        [f"{cell:.1%}" for cell in cells],
                    )
                )
        peaks = [of_limit(gpu.peak_nbytes, gpu.limit_nbytes) for gpu, _ in gpus]
        rows.append((f"{name} peak memory", peaks))
    rows.append(("updates on the host", [format_seconds(one.host_update_s) for one in both]))
    host = [of_limit(one.host_nbytes, one.host_limit_nbytes) for one in both]
    rows.append(("host memory", host))
    head = ["", "predicted", "measured"][: 1 + len(both)]
    return _table(head, [[name, *cells, *[""] * (len(both) - len(cells))] for name, cells in rows])


def _timeline(view: PlanView, last: Timeline | None) -> str:
    used = {span.kind for span in view.timeline.spans}
    used |= set() if last is None else {span.kind for span in last.spans}
    keys = "".join(
        f'<span class="key"><i style="background:var(--{kind})"></i>{kind}</span>'
        for kind in SPAN_KINDS
        if kind in used
    )
    buttons = "".join(
        f'<button type="button" data-key="{key}" aria-label="{label}">{text}</button>'
        for key, label, text in (
            ("+", "zoom in", "+"),
            ("-", "zoom out", "−"),  # noqa: RUF001
            ("PageUp", "earlier", "◀"),
            ("PageDown", "later", "▶"),
            ("0", "show all", "all"),
        )
    )
    return (
        f'<section class="timeline"><div class="tools">{buttons}</div><p>{keys}</p>'
        f'<svg tabindex="0" role="application" aria-label="Timeline of every stream, and memory. '
        f'{_HELP}"></svg><output aria-live="polite">{_HELP}</output></section>'
    )


def _traffic(predicted: Metrics, measured: Metrics | None) -> str:
    """Bytes of a step by link and kind, over all GPUs, and how long the links are in use."""
    found = (measured or predicted).traffic_nbytes()
    if not found:
        return "<p>No bytes cross the links.</p>"
    kinds = [kind for kind in KINDS if any(kind in row for row in found.values())]
    both = {"predicted": predicted} | ({} if measured is None else {"measured": measured})
    rows = []
    for link in (link for link in LINKS if link in found):
        row = found[link]
        cells = [format_bytes(row[kind]) if kind in row else "-" for kind in kinds]
        use = [
            sum(gpu.link_busy_s[link] for gpu in one.gpus) / len(one.gpus) / (one.timeline_s or 1)
            for one in both.values()
        ]
        total = format_bytes(sum(row.values()))
        rows.append([LINK_NAMES[link], *cells, total, *(f"{share:.0%}" for share in use)])
    return _table(["a step", *kinds, "sum", *(f"in use, {name}" for name in both)], rows)


def _memory(view: PlanView) -> str:
    assert view.memory is not None
    rows = []
    for index, kinds in enumerate(view.memory.gpus):
        rows += [[f"gpu{index} at its peak", k, "", format_bytes(n)] for k, n in kinds.items()]
    for kind, nbytes in view.memory.host.items():
        rows.append(["host", kind, view.dtypes.get(kind, ""), format_bytes(nbytes)])
    head = ["where", "what", "type", "bytes"]
    if not any(row[2] for row in rows):
        head, rows = [*head[:2], head[3]], [[*row[:2], row[3]] for row in rows]
    return _table(head, rows, "left")


def _plan(view: PlanView) -> str:
    rows = [("plan", describe_spec(view.plan.spec, view.plan.policy))]
    rows += [("machine", note) for note in view.machine_notes]
    rows += [("costs", view.costs_from)] if view.costs_from else []
    packs = [gpu.packs for gpu in figures(view).gpus]
    if len(set(packs)) == 1:
        rows.append(("packs", packs[0]))
    else:
        rows += [(f"packs of gpu{index}", text) for index, text in enumerate(packs)]
    rows += [(answer.question, answer.text) for answer in view.answers]
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th><td>{escape(text)}</td></tr>"
        for label, text in rows
    )
    return f'<table class="text">{body}</table>'


def _decisions(view: PlanView) -> str:
    """Each decision, with what else there was folded under it."""
    plan = view.plan
    parts = []
    for item in plan.decisions:
        why = f"; {item.why}" if item.why else ""
        head = f"<strong>{escape(item.name)}</strong>: {escape(item.chosen + why)}"
        parts.append(_folded(head, _outcomes(view, item.alternatives)))
    if plan.alternatives:
        parts.append(_folded("<strong>Whole plans</strong>", _outcomes(view, plan.alternatives)))
    return "<h2>Decisions</h2>" + "".join(parts) if parts else ""


def _folded(head: str, lines: Sequence[str]) -> str:
    inner = "".join(f"<li>{escape(line)}</li>" for line in lines)
    if not inner:
        return f"<p>{head}</p>"
    return f"<details><summary>{head}</summary><ul>{inner}</ul></details>"


def _outcomes(view: PlanView, options: Iterable[tuple[str, float | str]]) -> list[str]:
    return [outcome_text(view.step_s, what, outcome) for what, outcome in options]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    top = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'
