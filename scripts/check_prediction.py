#!/usr/bin/env python3
"""Predicted against measured step time, on virtual GPUs of several speeds, and chosen plans.

    scripts/check_prediction.py [--json] [--steps 6] [--only 3 7]

Each setting trains a small GPT in a process of its own, on virtual GPUs whose links are throttled
and whose operators take an injected time, so that several of them behave like GPUs of their own
although they share the cores: what is injected is much longer than what is computed, and takes no
core. Compares the seconds that a plan is predicted to take with the median of what was measured:
plans of the search's, and plans made to show one thing (replicas with a pipeline each, activations
kept on the GPU or on the host, weights that stay).

For some settings the plans that the search finds under other modes and microbatch sizes are
measured as well: the one that it chooses freely has to be the fastest or close to it.

Exits 1 if a prediction is off by more than 10 %, or a choice is more than 5 % slower than another.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from pretrain_gpt import batches, loss_fn, make_model

import harmony
from harmony.engine.call_key import CallKind
from harmony.errors import HarmonyError
from harmony.planner.check.verify import verify
from harmony.planner.ir.plan import Plan, describe_spec
from harmony.planner.ir.policy import Policy
from harmony.planner.ir.task_graph import build_tasks
from harmony.planner.ir.tasks import Pack, Phase, StepSpec
from harmony.planner.lower.passes import lower
from harmony.planner.predict.simulate import Simulation
from harmony.planner.search.search import choose

BAR_PERCENT, CHOICE_BAR_PERCENT = 10.0, 5.0
WIDTH, DEPTH, HEADS, CONTEXT, BATCH = 128, 6, 4, 16, 8


@dataclass(frozen=True)
class Setting:
    """A server, and how the model is trained on it.

    Attributes:
        plan: ``"chosen"`` by the search in ``mode`` with microbatches of ``size`` (0: any), or
            made of ``packs`` equal packs that ``"recompute"``, ``"save"`` activations on the
            GPU, ``"offload"`` them to the host, or stay ``"resident"``.
        replicas: of a plan that is made: GPUs of each are ``gpus / replicas``.
        compare: whether to measure what the search finds under other modes and sizes as well.
    """

    gpus: int
    link: str
    delay_us: float
    memory: str = "5MiB"
    plan: str = "chosen"
    mode: str = "auto"
    size: int = 2
    packs: int = 4
    replicas: int = 1
    compare: bool = False

    def __str__(self) -> str:
        how = f"{self.mode}, u={self.size or 'auto'}"
        if self.plan != "chosen":
            how = f"{self.packs} packs, {self.replicas} x {self.gpus // self.replicas} GPU"
        server = f"{self.gpus} GPU {self.memory:>5} {self.link:>6} {self.delay_us:4.0f} us/op"
        return f"{server}  {self.plan:<9} {how:<19}"


SETTINGS = (
    Setting(1, "1GB/s", 1000.0),  # bound by compute
    Setting(1, "5MB/s", 200.0),  # bound by its link
    Setting(1, "20MB/s", 500.0, "64MiB", "save"),
    Setting(1, "20MB/s", 500.0, "64MiB", "offload"),
    Setting(1, "20MB/s", 500.0, "64MiB", "resident"),
    Setting(2, "20MB/s", 1000.0, mode="pp"),
    Setting(2, "20MB/s", 1000.0, mode="dp"),
    Setting(2, "20MB/s", 500.0, "64MiB", "save", packs=6),
    Setting(2, "20MB/s", 500.0, "64MiB", "offload", packs=6),
    Setting(3, "10MB/s", 500.0, mode="pp"),
    Setting(4, "20MB/s", 1000.0, mode="pp"),
    Setting(4, "5MB/s", 500.0, mode="pp"),
    Setting(4, "5MB/s", 500.0, mode="dp"),
    Setting(4, "10MB/s", 500.0, "64MiB", "recompute", packs=6, replicas=2),
    Setting(4, "10MB/s", 500.0, "64MiB", "save", packs=6, replicas=2),
    Setting(1, "10MB/s", 500.0, "8MiB", size=0, compare=True),
    Setting(2, "5MB/s", 500.0, size=0, compare=True),
    Setting(4, "20MB/s", 1000.0, "8MiB", size=0, compare=True),
)


def main() -> int:
    """Run every setting, print a table, and return 1 if one misses a bar."""
    args = parse_arguments()
    if args.setting is not None:
        print(json.dumps(measure(Setting(**json.loads(args.setting)), args.steps)))
        return 0
    rows = []
    for number, setting in enumerate(SETTINGS):
        if args.only and number not in args.only:
            continue
        command = [sys.executable, __file__, "--steps", str(args.steps)]
        words = [*command, "--setting", json.dumps(asdict(setting))]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        row = {**asdict(setting), **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        if not args.json:
            print(*describe(number, setting, row), sep="\n", flush=True)
    worst = max(abs(row["error_percent"]) for row in rows)
    lost = max((row["lost_percent"] for row in rows if row["compare"]), default=0.0)
    passed = worst <= BAR_PERCENT and lost <= CHOICE_BAR_PERCENT
    if args.json:
        figures = {
            "worst_percent": worst,
            "bar_percent": BAR_PERCENT,
            "lost_percent": lost,
            "choice_bar_percent": CHOICE_BAR_PERCENT,
            "passed": passed,
        }
        print(json.dumps({**figures, "settings": rows}, indent=2))
    else:
        print(
            f"{len(rows)} settings; worst prediction {worst:.1f} % (bar {BAR_PERCENT:.0f} %),"
            f" worst choice {lost:.1f} % slower than the best measured (bar"
            f" {CHOICE_BAR_PERCENT:.0f} %): {'held' if passed else 'MISSED'}"
        )
    return 0 if passed else 1


def measure(setting: Setting, steps: int) -> dict[str, Any]:
    """Train in this process and return predicted and measured seconds of a step."""
    torch.set_num_threads(1)
    harmony.virtual_gpus(
        count=setting.gpus, memory=setting.memory, link=setting.link, delay_us=setting.delay_us
    )
    plans = plans_of(setting)
    found = [run(setting, plan, steps) for plan in plans]
    chosen = found[0]
    best_s = min(row["measured_s"] for row in found)
    return {
        **chosen,
        "lost_percent": (chosen["measured_s"] / best_s - 1) * 100,
        "others": found[1:],
    }


def new_model(setting: Setting) -> harmony.Harmony:
    """A model whose plan is the search's."""
    torch.manual_seed(0)
    return harmony.Harmony(
        make_model(WIDTH, DEPTH, HEADS, CONTEXT),
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"fused": True},
        loss_fn=loss_fn,
        mode=setting.mode,
        microbatch_size=setting.size or "auto",
    )


def planned_for(model: harmony.Harmony) -> tuple[Any, Any]:
    """The variant that stands for the model, and its plan with what it was made from."""
    inputs, targets = next(iter(batches(1, BATCH, CONTEXT)))
    call = ((inputs,), {}, targets)
    ready = model._engine.variants.ready(CallKind.TRAIN_STEP, call)
    return ready.variant, ready.planned


def plans_of(setting: Setting) -> list[Plan]:
    """The plan of a setting first, and those that it is compared with."""
    model = new_model(setting)
    _, planned = planned_for(model)
    plan, known = planned.plan, planned.measured
    if setting.plan != "chosen":
        return [made_plan(setting, planned)]
    plans = [plan]
    sizes = (1, 2, 4, 8) if setting.compare else ()
    for mode in ("pp", "dp") if setting.gpus > 1 else ("pp",):
        for size in sizes:
            if mode == "dp" and size > BATCH // setting.gpus:
                continue
            question = (planned.graph, known.costs, known.machine, BATCH)
            try:
                plans.append(choose(*question, mode=mode, microbatch_size=size))
            except HarmonyError:
                continue  # it does not fit
    described = {describe_spec(p.spec, p.policy): p for p in reversed(plans)}
    return [plan, *(p for p in described.values() if p.spec != plan.spec)]


def made_plan(setting: Setting, planned: Any) -> Plan:
    """A plan of equal packs."""
    graph, known = planned.graph, planned.measured
    num_layers = graph.num_layers
    cuts = [num_layers * i // setting.packs for i in range(setting.packs + 1)]
    packs = tuple(Pack(a, b) for a, b in pairwise(cuts))
    edges = [BATCH * r // setting.replicas for r in range(setting.replicas + 1)]
    keeps = setting.plan in ("save", "offload", "resident")
    saved = packs[:-1] if keeps else ()
    spec = StepSpec(
        BATCH, setting.size, setting.size, packs[:-1], packs, tuple(pairwise(edges)), saved=saved
    )
    # The embedding's weights are the head's too: packs that share cannot stay.
    own = tuple(pack for pack in packs if not graph.shared_in(pack.first, pack.last))
    policy = Policy(
        offload=saved if setting.plan == "offload" else (),
        resident=own if setting.plan == "resident" else (),
        mirror=keeps,
    )
    tasks = build_tasks(graph, spec)
    schedule = lower(tasks, known.machine, policy)
    checked = verify(schedule, graph, known.costs, Phase.TRAIN, tasks)
    return replace(
        planned.plan,
        spec=spec,
        policy=policy,
        schedules={Phase.TRAIN: schedule},
        peak_nbytes=checked.peak_nbytes,
    )


def run(setting: Setting, plan: Plan, steps: int) -> dict[str, Any]:
    """Train by a plan, in a model of its own; predicted from what was measured for that."""
    gc.collect()  # the model before holds the virtual GPUs' memory
    model = new_model(setting)
    variant, planned = planned_for(model)
    own = replace(
        planned.plan,
        spec=plan.spec,
        policy=plan.policy,
        schedules=plan.schedules,
        peak_nbytes=plan.peak_nbytes,
    )
    variant.learn(replace(planned, plan=own))
    known = planned.measured
    predicted_s = Simulation(plan.schedule, planned.graph, known.costs, known.machine).step_s
    measured = []
    for inputs, targets in batches(steps, BATCH, CONTEXT):
        model.train_step(inputs, targets)
        assert model.last_timeline is not None
        measured.append(model.last_timeline.step_s)
    typical = statistics.median(measured[1:])
    return {
        "predicted_s": predicted_s,
        "measured_s": typical,
        "error_percent": (typical / predicted_s - 1) * 100,
        "what": describe_spec(plan.spec, plan.policy),
    }


def describe(number: int, setting: Setting, row: dict[str, Any]) -> list[str]:
    """The lines of a setting."""
    lines = [f"{number:2} {setting} {_times(row)}"]
    if row["compare"]:
        lines[0] += f"  {row['lost_percent']:4.1f} % slower than the best"
        lines.append(f"       chosen: {row['what']}")
        lines += [f"       {_times(other)}  {other['what']}" for other in row["others"]]
    return lines


def _times(row: dict[str, Any]) -> str:
    predicted_ms, measured_ms = row["predicted_s"] * 1e3, row["measured_s"] * 1e3
    return f"{predicted_ms:7.1f} ms, measured {measured_ms:7.1f} ms {row['error_percent']:+5.1f} %"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of settings")
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
