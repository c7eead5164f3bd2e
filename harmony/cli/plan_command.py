"""`harmony-run plan`: plans a model on machines that may not be there, and compares plans.

    harmony-run plan --model llama-7b --gpu "RTX 4090" --host-memory 256GiB
    harmony-run plan --model-profile gpt.json --gpu "RTX 4090" --gpus 4 --host-memory 256GiB
                     --minibatch 64

Needs no GPU and, for a saved profile, no torch. Exit codes: 0; 1 if nothing fits or a file cannot
be used; 2 for a command line that makes no sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from harmony.core.files import is_file, write_text
from harmony.core.units import format_bytes, format_seconds
from harmony.errors import ConfigError, DoesNotFitError
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan
from harmony.planner.ir.plan_file import (
    check_minibatch,
    check_plan,
    compare_plans,
    load_plan,
    save_plan,
)
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.questions import largest_model, smallest_minibatch
from harmony.profiling.catalog import GPUS, TOPOLOGIES, find_gpu
from harmony.profiling.model_profile import ModelProfile, load_profile, save_profile
from harmony.profiling.plan_request import PlanRequest, Task, chosen, machine_and_costs
from harmony.report.memory import memory_of
from harmony.report.metrics import forward_seconds
from harmony.report.page import page
from harmony.report.plan_view import (
    SMALLEST,
    Answered,
    PlanView,
    ascii_only,
    table_text,
    view_json,
    view_text,
)
from harmony.report.text import form_of
from harmony.report.trace_file import trace_events

DEFAULT_MINIBATCH = 8
"""Samples of a step of a model that comes from a configuration."""


def run(request: PlanRequest, out: TextIO) -> None:
    """Do what ``harmony-run plan`` was asked for, writing to ``out``.

    Raises:
        ConfigError: if the words make no sense together, or a file is missing.
        PlanError: if a file cannot be used, or nothing fits.
    """
    if request.list_gpus:
        write_lines(_catalog_lines(), out)
    elif any(_is_file(word) for word in request.compare):
        if len(request.compare) != 2:
            raise ConfigError("--compare takes two saved plans, or names of GPUs")
        one, other = request.compare
        plans = load_plan(Path(one)), load_plan(Path(other))
        write_lines(compare_plans(*plans, (one, other)), out)
    elif request.compare:
        _compare_gpus(request, out)
    else:
        _plan(request, out)


def _is_file(word: str) -> bool:
    return word.endswith(".json") or is_file(Path(word))


def _plan(request: PlanRequest, out: TextIO) -> None:
    task = task_of(request)
    plan = chosen(request, task) if request.plan is None else _pinned(request.plan, task)
    view = view_of(request, task, plan)
    if request.save_plan is not None:
        save_plan(plan, request.save_plan)
    show(view, out, request.as_json, request.explain)
    if request.report is not None:
        write_text(_as_file(view, request), request.report, "the report")


def _as_file(view: PlanView, request: PlanRequest) -> str:
    """The plan in the form that the ending of ``--report`` says."""
    assert request.report is not None
    form = form_of(request.report)
    if form == ".html":
        return page([(view, None, None)])
    if form == ".trace.json":
        name = f"{view.name} predicted"
        memory = {} if view.memory is None else {name: view.memory}
        return json.dumps(trace_events({name: view.timeline}, memory))
    if form == ".json":
        return json.dumps(view_json(view, explain=True), indent=1)
    return "".join(f"{line}\n" for line in view_text(view, explain=request.explain))


def view_of(request: PlanRequest, task: Task, plan: Plan) -> PlanView:
    """What is worth seeing of a plan that was made for a task."""
    graph, costs, machine = task.profile.graph, task.costs, task.machine
    return PlanView(
        name=task.profile.name,
        plan=plan,
        timeline=simulate(plan.schedule, graph, costs, machine),
        work=task.profile.work,
        costs_from=task.costs_from,
        machine_notes=task.notes,
        tf32=request.tf32,
        answers=_answers(request, task),
        forward_s=forward_seconds(plan, graph, costs, machine),
        memory=memory_of(plan, graph, costs),
        dtypes=task.profile.dtypes,
    )


def _compare_gpus(request: PlanRequest, out: TextIO) -> None:
    """Plan the same training on several machines, and show one table."""
    asked = []
    for word in request.compare:  # a name that is wrong is refused before the model is counted
        number, name = _number_of(word, request.gpus)
        one = replace(request, gpu=find_gpu(name).name, gpus=number, smallest_minibatch=True)
        asked.append((f"{number} x {one.gpu}" if number > 1 else str(one.gpu), one))
    profile = profile_of(request)
    rows: list[tuple[str, PlanView | str]] = []
    for label, one in asked:
        try:
            task = machine_and_costs(one, profile, minibatch_of(one, profile))
            rows.append((label, view_of(one, task, chosen(one, task))))
        except DoesNotFitError as error:
            rows.append((label, str(error)))
    if request.as_json:
        found = {label: view if isinstance(view, str) else view_json(view) for label, view in rows}
        out.write(json.dumps(found, indent=1) + "\n")
    else:
        write_lines(table_text(profile.name, rows), out)


def _number_of(word: str, default: int | None) -> tuple[int, str]:
    """``"4xA100"``: four of them."""
    found = re.fullmatch(r"(\d{1,3}) ?x ?(.+)", word)
    return (default or 1, word) if found is None else (int(found[1]), found[2])


def show(view: PlanView, out: TextIO, as_json: bool = False, explain: bool = False) -> None:
    """Write a plan as text or JSON."""
    if as_json:
        out.write(json.dumps(view_json(view, explain=explain), indent=1) + "\n")
    else:
        write_lines(view_text(view, explain=explain), out)


def write_lines(lines: Sequence[str], out: TextIO) -> None:
    """Write lines, in ASCII where the stream has nothing else."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        text = "".join(f"{line}\n" for line in ascii_only(lines))
    out.write(text)


def task_of(request: PlanRequest) -> Task:
    """Understand a request: find the model, describe the machine, find the costs.

    Raises:
        ConfigError: if something is missing or unknown.
        PlanError: if the profile cannot be used.
    """
    profile = profile_of(request)
    return machine_and_costs(request, profile, minibatch_of(request, profile))


def profile_of(request: PlanRequest) -> ModelProfile:
    """Read the profile that a request names, or count the model of a configuration.

    Raises:
        ConfigError: if there is none, or it cannot be read.
        PlanError: if the profile cannot be used.
    """
    if request.model_profile is not None:
        return load_profile(request.model_profile)
    if request.model is None:
        raise ConfigError(
            "which model? Give --model CONFIG (a Hugging Face config.json, or a preset as"
            " llama-7b), or --model-profile FILE, saved by"
            " harmony-run --save-profile FILE train.py"
        )
    from harmony.integrations.model_config import profile_of_config  # late: it needs torch

    profile = profile_of_config(
        request.model,
        request.minibatch or DEFAULT_MINIBATCH,
        tokens=request.tokens,
        precision=request.precision or "bf16",
        lora=request.lora,
    )
    if request.save_profile is not None:
        save_profile(profile, request.save_profile)
    return profile


def minibatch_of(request: PlanRequest, profile: ModelProfile) -> int:
    """Samples of a step.

    Raises:
        ConfigError: if nobody says how many.
    """
    minibatch = request.minibatch or profile.minibatch
    if minibatch is None:
        raise ConfigError("--minibatch: how many samples has a step? The profile does not say")
    return minibatch


def _pinned(path: Path, task: Task) -> Plan:
    """A saved plan, checked against the model and the machine.

    Raises:
        PlanError: if it does not match.
    """
    plan = load_plan(path)
    graph = task.profile.graph
    phase = task.profile.phase
    check_plan(plan, graph, task.machine, phase)
    check_minibatch(plan, task.minibatch)
    verify(plan.schedule, graph, task.costs, phase, build_tasks(graph, plan.spec))
    timeline = simulate(plan.schedule, graph, task.costs, task.machine)
    peaks = tuple(timeline.peak_nbytes)
    # Its figures are those of the machine that it was made for: predict them for this one.
    pinned = replace(
        plan,
        machine=task.machine,
        step_s=timeline.step_s,
        peak_nbytes=peaks,
        traffic=timeline.bytes_by(),
        alternatives=(),
    )
    check_plan(pinned, graph, task.machine, phase)
    return pinned


def _answers(request: PlanRequest, task: Task) -> tuple[Answered, ...]:
    """Answers to the further questions that were asked; one that has none says why."""
    found = []
    for asked, question, answer in (
        (request.smallest_minibatch, SMALLEST, _smallest),
        (request.largest_model, "largest model that fits", _largest),
    ):
        if asked:
            try:
                value, text = answer(request, task)
                found.append(Answered(question, value, text))
            except (ConfigError, DoesNotFitError) as error:
                found.append(Answered(question, None, str(error)))
    return tuple(found)


def _smallest(request: PlanRequest, task: Task) -> tuple[int, str]:
    graph = task.profile.graph
    found = smallest_minibatch(graph, task.costs, task.machine, mode=request.mode)
    step = format_seconds(found.plan.step_s)
    samples = "1 sample" if found.value == 1 else f"{found.value} samples"
    return found.value, f"{samples}, {step} a step; {found.why}"


def _largest(request: PlanRequest, task: Task) -> tuple[int, str]:
    graph = task.profile.graph
    found = largest_model(graph, task.costs, task.machine, task.minibatch, mode=request.mode)
    nbytes = found.graph.weight_nbytes()
    size = f"{format_bytes(nbytes)} of weights"
    if task.profile.num_params:
        params = task.profile.num_params * nbytes / graph.weight_nbytes()
        size = f"{params / 1e9:.3g} billion parameters, {size}"
    return found.value, (
        f"{found.value} of its repeated blocks ({found.graph.num_layers} layers, {size}),"
        f" {format_seconds(found.plan.step_s)} a step; {found.why}"
    )


def _catalog_lines() -> list[str]:
    """The table of GPUs, and of hosts and topologies."""
    head = f"{'GPU':<16}{'memory':>9}{'fp32':>7}{'TF32':>7}{'bf16':>7}{'fp16':>7}"
    lines = [f"{head}{'GB/s':>7}{'PCIe':>6}{'NVLink':>8}   dense TFLOP/s; source"]
    for gpu in GPUS:
        rates = (gpu.flops.get(kind) for kind in ("fp32", "tf32", "bf16", "fp16"))
        cells = "".join(f"{'-' if rate is None else f'{rate / 1e12:.4g}':>7}" for rate in rates)
        peer = f"{gpu.peer_bytes_per_s / 1e9:.0f}" if gpu.peer_bytes_per_s else "-"
        lines.append(
            f"{gpu.name:<16}{gpu.memory_nbytes / 2**30:>5.1f} GiB{cells}"
            f"{gpu.memory_bytes_per_s / 1e9:>7.0f}{gpu.pcie:>6}{peer:>8}   {gpu.source}"
        )
    topologies = "; ".join(f"{name}: {what}" for name, what in TOPOLOGIES.items())
    return [*lines, "", f"--topology  {topologies}"]
