"""Shows a plan before it runs: its figures, a picture of its timeline, why it was chosen.

Everything is text of `WIDTH` columns; `ascii_only` replaces what is not ASCII. The figures are
plain data first (`view_json`), the text is made of them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harmony.core.timeline import Timeline
from harmony.core.units import format_bytes, format_seconds
from harmony.planner.ir.plan import Plan, describe_spec
from harmony.planner.ir.tasks import TaskKind
from harmony.profiling.analytic import WorkTable, step_flops
from harmony.profiling.catalog import Gpu, known_gpu
from harmony.report.memory import MemoryUse, memory_of
from harmony.report.metrics import BOTTLENECKS, KINDS, LINKS, Metrics, metrics_of
from harmony.report.session import ModelRecord, PlanRun
from harmony.report.timeline_text import picture

WIDTH = 100
_ASCII = str.maketrans({"·": ".", "─": "-"})

TYPES = {"fp32": "fp32", "tf32": "TF32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Answered:
    """A further question and its answer.

    Attributes:
        value: the number asked for; None if there is none.
        text: the answer in words.
    """

    question: str
    value: int | None
    text: str


@dataclass(frozen=True)
class PlanView:
    """A plan and what is worth seeing of it.

    Attributes:
        name: of the model.
        timeline: what the plan is predicted to do.
        memory: what the bytes are for; None where the layers are not known.
        dtypes: of what is kept of the parameters, by kind.
        forward_s: seconds of the forward, where it has a schedule of its own: in a loop of one's
            own the plan's timeline is the backward's.
        work: FLOPs of layers, for the share of the peak; None if unknown.
        costs_from: in words where the costs come from.
        machine_notes: what was assumed of the machine.
        tf32: whether products of fp32 may run as TF32.
        answers: to further questions (`harmony.planner.search.questions`).
        gpu: what the devices are; by default the catalog is asked for their name.
        warnings: what the user should know.
    """

    name: str
    plan: Plan
    timeline: Timeline
    work: WorkTable | None = None
    costs_from: str = ""
    machine_notes: tuple[str, ...] = ()
    tf32: bool = False
    answers: tuple[Answered, ...] = ()
    gpu: Gpu | None = None
    warnings: tuple[str, ...] = ()
    forward_s: float = 0.0
    memory: MemoryUse | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @property
    def step_s(self) -> float:
        """Seconds of a whole step."""
        return self.plan.step_s + self.forward_s


@dataclass(frozen=True)
class PeakShare:
    """How much of what the GPUs could compute a step does.

    Attributes:
        model_flops: of a step, recomputation not counted.
        achieved_per_s: that over the time of a step and the GPUs.
        peak_per_s: dense peak of one GPU for these types.
        share: of the peak.
    """

    model_flops: float
    achieved_per_s: float
    peak_per_s: float
    share: float
    types: str


def view_of(record: ModelRecord, *, profiled: bool = False) -> PlanView:
    """What is worth seeing of the plan of a model that was planned in this session.

    Args:
        profiled: with the FLOPs of its layers, which are counted for it if the model is there.

    Raises:
        ValueError: if it has no plan yet.
    """
    run = record.run
    if run is None:
        raise ValueError(f"{record.name} has no plan yet: there is nothing to show")
    profile = record.profile() if profiled and record.profile is not None else None
    notes, source = record.planned_for[:-1], record.planned_for[-1:]
    if not source:
        notes = tuple(f"{label}: {text}" for label, text in record.facts.items())
        source = ("measured on this machine",)
    return PlanView(
        name=record.name,
        plan=run.plan,
        timeline=run.predicted,
        work=None if profile is None else profile.work,
        costs_from=source[0],
        machine_notes=notes,
        gpu=None if profile is None else known_gpu(profile.device),
        warnings=tuple(record.warnings),
        forward_s=record.forward_s,
        memory=None if run.layers is None else memory_of(run.plan, *run.layers),
        dtypes={} if profile is None else profile.dtypes,
    )


def figures(view: PlanView) -> Metrics:
    """The figures of the report, as predicted."""
    record = ModelRecord(view.name, {})
    record.runs.append(PlanRun(view.plan, view.timeline))
    return metrics_of(record)


def peak_share(view: PlanView) -> PeakShare | None:
    """The share of the GPUs' dense peak; None where FLOPs or the GPU's peak are not known."""
    plan = view.plan
    gpu = view.gpu or known_gpu(plan.machine.devices[0].name)
    if view.work is None or gpu is None or not view.step_s:
        return None
    spec = plan.spec
    sizes = [
        high - low
        for replica in range(len(spec.shares))
        for low, high in spec.microbatches(replica, TaskKind.BACKWARD)
    ]
    flops = step_flops(view.work, sizes)
    total = sum(flops.values())
    # Seconds at the peak of each type, so that mixed precision is counted fairly.
    ideal_s = sum(count / gpu.peak(_used(dtype, view.tf32)) for dtype, count in flops.items())
    if not total or not ideal_s:
        return None
    peak = total / ideal_s
    achieved = total / view.step_s / plan.schedule.num_devices
    types = " and ".join(TYPES.get(_used(t, view.tf32), t) for t, count in flops.items() if count)
    return PeakShare(total, achieved, peak, achieved / peak, types)


def _used(dtype: str, tf32: bool) -> str:
    return "tf32" if tf32 and dtype == "fp32" else dtype


def runner_up(plan: Plan) -> tuple[str, float | str] | None:
    """The best other candidate: what it is and its seconds, or why it was refused."""
    return plan.alternatives[0] if plan.alternatives else None


def view_json(view: PlanView, *, explain: bool = False) -> dict[str, Any]:
    """Everything that the text shows, as plain data."""
    plan, share = view.plan, peak_share(view)
    found = figures(view)
    second = runner_up(plan)
    data: dict[str, Any] = {
        "model": view.name,
        "fingerprint": plan.model,
        "mode": plan.mode,
        "minibatch": plan.minibatch,
        "description": describe_spec(plan.spec, plan.policy),
        "costs_from": view.costs_from,
        "step_s": view.step_s,
        "forward_s": view.forward_s or None,
        "samples_per_s": plan.minibatch / view.step_s if view.step_s else None,
        "model_flops": None if share is None else share.model_flops,
        "flops_per_s_per_gpu": None if share is None else share.achieved_per_s,
        "share_of_peak": None if share is None else share.share,
        "peak_nbytes": list(plan.peak_nbytes),
        "gpu_limit_nbytes": [device.memory_nbytes for device in plan.machine.devices],
        "host_nbytes": plan.host_nbytes,
        "host_limit_nbytes": plan.machine.host.memory_nbytes,
        "memory_nbytes": None
        if view.memory is None
        else {"host": view.memory.host, "gpus": view.memory.gpus},
        "dtypes": dict(view.dtypes),
        "traffic_nbytes": found.traffic_nbytes(),
        "gpus": [gpu.__dict__ for gpu in found.gpus],
        "host_update_s": found.host_update_s,
        "bound": plan.bound,
        "advice": plan.advice,
        "lower_bound_s": plan.bound_s or None,
        "lower_bound_reason": plan.bound_reason or None,
        "runner_up": None if second is None else {"what": second[0], "outcome": second[1]},
        "machine": plan.machine.to_json(),
        "answers": {a.question: {"value": a.value, "text": a.text} for a in view.answers},
        "warnings": list(view.warnings),
    }
    if explain:
        data["decisions"] = [
            {
                "name": item.name,
                "chosen": item.chosen,
                "why": item.why,
                "alternatives": [list(pair) for pair in item.alternatives],
            }
            for item in plan.decisions
        ]
        data["alternatives"] = [list(pair) for pair in plan.alternatives]
    return data


def view_text(view: PlanView, *, explain: bool = False) -> list[str]:
    """The plan in lines of text."""
    lines = [*_head(view), "", *_gpus(view), *_memory(view), "", *_traffic(view), ""]
    lines += picture(view.timeline)
    if explain:
        lines += ["", *explanation(view.plan, view.step_s)]
    if view.answers:
        texts = (f"{item.question}: {item.text}" for item in view.answers)
        lines += ["", *(part for text in texts for part in _wrapped("", text))]
    return lines


SMALLEST = "smallest minibatch that hides the transfers"
"""A question that the table of several machines answers for each."""


def table_text(name: str, rows: Sequence[tuple[str, PlanView | str]]) -> list[str]:
    """Plans of one model on several machines as a table; of one that has none, why not.

    Args:
        rows: what the machine is, and its plan, or why nothing fits.
    """
    views = [view for _, view in rows if isinstance(view, PlanView)]
    minibatch = f", minibatch {views[0].plan.minibatch}" if views else ""
    width = max(len(label) for label, _ in rows) + 2
    head = f"{'step':>9}{'samples/s':>11}{'of peak':>9}{'GPU memory':>12}{'host':>10}"
    lines = [f"Plans · {name}{minibatch}", f"{'':<{width}}{head}{'hides at':>10}  limit"]
    for label, view in rows:
        if isinstance(view, str):
            lines += textwrap.wrap(
                f"does not fit: {view}",
                WIDTH,
                initial_indent=f"{label:<{width}}",
                subsequent_indent=" " * width,
            )
            continue
        share = peak_share(view)
        found = next((a.value for a in view.answers if a.question == SMALLEST), None)
        cells = (
            f"{format_seconds(view.step_s):>9}",
            f"{view.plan.minibatch / view.step_s:>11.3g}",
            f"{'-' if share is None else f'{share.share:.0%}':>9}",
            f"{format_bytes(max(view.plan.peak_nbytes)):>12}",
            f"{format_bytes(view.plan.host_nbytes):>10}",
            f"{'-' if found is None else found:>10}",
        )
        lines.append(f"{label:<{width}}{''.join(cells)}  {BOTTLENECKS.get(view.plan.bound)}")
    return [*lines, *textwrap.wrap(_TABLE_NOTE, WIDTH)]


_TABLE_NOTE = (
    "hides at: samples of the smallest minibatch whose transfers hide behind compute; limit: what "
    "sets the pace. A plan in full: the same with --gpu NAME"
)


def ascii_only(lines: Sequence[str]) -> list[str]:
    """The same lines in ASCII, for terminals that have nothing else."""
    return [line.translate(_ASCII).encode("ascii", "replace").decode("ascii") for line in lines]


def _wrapped(label: str, text: str) -> list[str]:
    """A label of twelve columns, and text beside it."""
    start = f"{label:<12}" if label else ""
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _head(view: PlanView) -> list[str]:
    plan = view.plan
    names = sorted({device.name for device in plan.machine.devices})
    many = "" if plan.machine.num_devices == 1 else f"{plan.machine.num_devices} x "
    gpus = f"{many}{', '.join(names)}" if len(names) == 1 else ", ".join(names)
    lines = [f"Plan · {view.name} on {gpus}, minibatch {plan.minibatch}"]
    for note in view.machine_notes:
        lines += _wrapped("machine", note)
    if view.costs_from:
        lines += _wrapped("costs", view.costs_from)
    for label, text in figures(view).in_words().items():
        if not label.startswith("packs"):  # those are beside their GPUs
            lines += _wrapped(label, text)
    lines += _wrapped("in detail", describe_spec(plan.spec, plan.policy))
    lines += _wrapped("step", _step_text(view))
    if plan.bound_s:
        lines += _wrapped("limit", _limit_text(view))
    lines += _wrapped("bottleneck", f"{BOTTLENECKS.get(plan.bound, plan.bound)}. {plan.advice}")
    lines += _wrapped("runner-up", _runner_up_text(view))
    for warning in view.warnings:
        lines += _wrapped("warning", warning)
    return lines


def _step_text(view: PlanView) -> str:
    plan = view.plan
    parts = [format_seconds(view.step_s)]
    if view.forward_s:
        parts[0] += (
            f" (forward {format_seconds(view.forward_s)}, backward {format_seconds(plan.step_s)},"
            " shown below)"
        )
    if view.step_s:
        parts.append(f"{plan.minibatch / view.step_s:.4g} samples/s")
    share = peak_share(view)
    if share is not None:
        parts.append(
            f"{share.share:.0%} of peak ({share.achieved_per_s / 1e12:.3g} of"
            f" {share.peak_per_s / 1e12:.4g} TFLOP/s a GPU, dense {share.types})"
        )
    return ", ".join(parts)


def _limit_text(view: PlanView) -> str:
    plan = view.plan
    return (
        f"no plan can take less than {format_seconds(plan.bound_s)} ({plan.bound_reason}); this"
        f" one takes {view.step_s / plan.bound_s:.2f} times that"
    )


def _runner_up_text(view: PlanView) -> str:
    plan, second = view.plan, runner_up(view.plan)
    if second is None:
        return "no other plan was looked at"
    what, outcome = second
    # Most of what describes the two plans is the same: only what differs is of interest.
    chosen = describe_spec(plan.spec, plan.policy).split(", ")
    parts = what.split(", ")
    other = [part for part in parts if part not in chosen]
    if other and len(other) < len(parts):
        what = f"with {', '.join(other)}"
    if isinstance(outcome, str):
        return f"{what}: {outcome}"
    slower = outcome / view.step_s - 1 if view.step_s else 0.0
    lost = f"{slower:.1%} slower" if slower > 5e-4 else "as fast, and found after it"
    return f"{what}: {format_seconds(outcome)} a step, {lost}"


def _gpus(view: PlanView) -> list[str]:
    """A line a GPU: how busy it is, what it waits for, its memory, its packs."""
    found = figures(view)
    whole = found.timeline_s or 1.0
    lines = [f"{'GPU':<7}{'busy':>5}  {'peak memory':<24}waits for"]
    for index, gpu in enumerate(found.gpus):
        used = f"{format_bytes(gpu.peak_nbytes)} of {format_bytes(gpu.limit_nbytes)}"
        ranked = sorted(gpu.stalls_s.items(), key=lambda item: -item[1])
        waits = ", ".join(f"{c} {s / whole:.0%}" for c, s in ranked if s > 0.005 * whole)
        lines.append(f"gpu{index:<4}{gpu.busy_s / whole:>5.0%}  {used:<24}{waits or '-'}")
    host = f"{format_bytes(found.host_nbytes)} of {format_bytes(found.host_limit_nbytes)}"
    update = f"updates {format_seconds(found.host_update_s)} a step"
    lines.append(f"{'host':<7}{'':>5}  {host:<24}{update}")
    shown = [(f"gpu{index}", gpu.packs) for index, gpu in enumerate(found.gpus)]
    if len({packs for _, packs in shown}) == 1:
        shown = [("packs", shown[0][1])]
    for name, packs in shown:
        lines += _wrapped(name, packs)
    return lines


def _memory(view: PlanView) -> list[str]:
    """What the memory of the host and of each GPU at its peak is for."""
    if view.memory is None:
        return []
    gpus = view.memory.gpus
    rows = {f"gpu{index}": kinds for index, kinds in enumerate(gpus)}
    if len({tuple(kinds.items()) for kinds in gpus}) == 1 and len(gpus) > 1:
        rows = {"each GPU": gpus[0]}
    lines = ["", "Memory by kind"]
    for name, kinds in {**rows, "host": view.memory.host}.items():
        shown = []
        for kind, nbytes in kinds.items():
            dtype = view.dtypes.get(kind, "") if name == "host" else ""
            shown.append(f"{kind} {f'({dtype}) ' if dtype else ''}{format_bytes(nbytes)}")
        lines += _wrapped(name, "; ".join(shown))
    return lines


def _traffic(view: PlanView) -> list[str]:
    """Bytes a step by link and kind, over all GPUs, and how much of the step links are in use."""
    found = figures(view)
    total = found.traffic_nbytes()
    if not total:
        return ["No bytes cross the links."]
    kinds = [kind for kind in KINDS if any(kind in row for row in total.values())]
    kinds += sorted({kind for row in total.values() for kind in row} - set(kinds))
    unit, size = _unit(max(sum(row.values()) for row in total.values()))
    widths = [max(8, len(kind)) for kind in (*kinds, "sum", "in use")]
    head = [f"{unit} a step".ljust(14)]
    head += [k.rjust(w) for k, w in zip((*kinds, "sum", "in use"), widths, strict=True)]
    lines = ["  ".join(head)]
    for link in (link for link in LINKS if link in total):
        row = total[link]
        cells = [f"{row[kind] / size:,.2f}" if kind in row else "-" for kind in kinds]
        cells.append(f"{sum(row.values()) / size:,.2f}")
        busy = [gpu.link_busy_s[link] for gpu in found.gpus]
        cells.append(f"{sum(busy) / len(busy) / found.timeline_s:.0%}")
        padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([link.ljust(14), *padded]))
    return lines


def _unit(nbytes: int) -> tuple[str, int]:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return unit, size
    return "KiB", 2**10


def explanation(plan: Plan, step_s: float | None = None) -> list[str]:
    """Each automatic decision, with what the alternatives were predicted to take.

    Args:
        step_s: seconds of a step by the plan; default: those of the planned phase.
    """
    chosen_s = step_s or plan.step_s
    lines = ["What was decided, and what else there was:"]
    for item in plan.decisions:
        why = f"; {item.why}" if item.why else ""
        lines += ["", *_wrapped("", f"{item.name}: {item.chosen}{why}")]
        for what, outcome in item.alternatives:
            lines += _option(chosen_s, what, outcome)
    if plan.alternatives:
        lines += ["", "Whole plans that were looked at:"]
        for what, outcome in plan.alternatives[:MOST_ALTERNATIVES]:
            lines += _option(chosen_s, what, outcome)
        left = len(plan.alternatives) - MOST_ALTERNATIVES
        lines += [f"  and {left} more"] if left > 0 else []
    return lines


MOST_ALTERNATIVES = 12


def _option(chosen_s: float, what: str, outcome: float | str) -> list[str]:
    text = outcome_text(chosen_s, what, outcome)
    return textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ")


def outcome_text(chosen_s: float, what: str, outcome: float | str) -> str:
    """What an alternative would have taken, beside the seconds of what was chosen."""
    if isinstance(outcome, str):
        return f"{what}: {outcome}"
    change = outcome / chosen_s - 1 if chosen_s else 0.0
    return f"{what}: {format_seconds(outcome)} a step ({change:+.1%})"
