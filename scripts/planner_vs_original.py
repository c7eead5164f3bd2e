#!/usr/bin/env python3
"""Our search against the original's: in the original's own space of decisions, and in ours.

    scripts/planner_vs_original.py --profiles DIR --cases CSV [--full] [--json]

DIR holds a profile MODEL.json for each model of the table; the table says what the original's
search found, and in how many seconds. Both are ranked by the original's estimate without prefetch,
under its memory rule; rows show the four-tuples, packs as [first, last] inclusive, so that anyone
can check them in the original's estimator. Bars: never worse than the original (nor than a plan
that its authors stored), better in the geometric mean, in a tenth of its time.
Exits 1 if a bar is missed, 2 if something cannot be read.

--full: our whole planner on the same profiles and GPUs, one row for each model, minibatch and
number of GPUs of the table, against the better of the original's two modes: as its search reports
it, and the four-tuple that we find with prefetch across tasks, which overlaps as ours does.
Beside it: pure compute, every layer forward and backward once; the same with every forward run
twice (a plan need not, for its last pack); what the links must carry. Our machine model has no
40 ms of deletion a task (`research.original.machine`). Exits 1 if a plan is slower than what
the original reports.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack
from harmony.planner.predict.lower_bound import lower_bound
from harmony.planner.search.search import choose
from harmony.profiling.original_format import to_layers
from research.original.estimator import estimate_s
from research.original.machine import machine_of
from research.original.profile import PaperProfile
from research.original.search import search
from research.original.tables import CaseRow, Profiles, read_cases

STORED_S = {("bert_96", "PP", 4, 64): 18.4333}
"""Seconds of a step of plans that the authors stored and their own search does not find."""

ROUNDING_S = 0.0005
"""The table has three digits after the point."""

SHARE_OF_TIME = 0.1


@dataclass(frozen=True)
class Row:
    """One case; seconds of a step and of a search, bytes of a GPU."""

    model: str
    mode: str
    gpus: int
    minibatch: int
    original_s: float
    step_s: float
    lower_bound_s: float
    memory_nbytes: int
    memory_cap_nbytes: int
    search_s: float
    original_search_s: float
    forward_size: int
    forward_packs: list[tuple[int, int]]
    backward_size: int
    backward_packs: list[tuple[int, int]]

    @property
    def ratio(self) -> float:
        """How many times the original's throughput."""
        return self.original_s / self.step_s

    @property
    def missed(self) -> list[str]:
        """The bars that this row misses."""
        found = []
        if self.step_s > self.original_s + ROUNDING_S:
            found.append("worse")
        if self.memory_nbytes > self.memory_cap_nbytes:
            found.append("too large")
        if self.search_s > SHARE_OF_TIME * self.original_search_s:
            found.append("slow")
        return found


def run(case: CaseRow, profile: PaperProfile) -> Row:
    """Search, and compare."""
    question = (case.mode, case.num_gpus, case.minibatch, case.memory_nbytes)
    # The search runs in one thread: what it takes of a core is what it would take alone.
    began = time.process_time()
    found = search(profile, *question)
    search_s = time.process_time() - began
    plan = found.plan
    return Row(
        case.model,
        case.mode,
        case.num_gpus,
        case.minibatch,
        original_s(case),
        found.step_s,
        found.lower_bound_s,
        found.memory_nbytes,
        case.memory_nbytes,
        search_s,
        case.search_s,
        plan.forward_size,
        inclusive(plan.forward_packs),
        plan.backward_size,
        inclusive(plan.backward_packs),
    )


@dataclass(frozen=True)
class FullRow:
    """Our whole planner for one model, minibatch and number of GPUs; seconds of a step."""

    model: str
    gpus: int
    minibatch: int
    original_s: float
    original_mode: str
    prefetch_s: float
    step_s: float
    plan: str
    compute_bound_s: float
    twice_s: float
    link_bound_s: float
    plan_s: float

    @property
    def ratio(self) -> float:
        """How many times the throughput that the original reports."""
        return self.original_s / self.step_s

    @property
    def prefetch_ratio(self) -> float:
        """How many times the throughput of the best four-tuple with prefetch."""
        return self.prefetch_s / self.step_s

    @property
    def missed(self) -> list[str]:
        """The bars that this row misses."""
        return ["worse"] if self.step_s > self.original_s else []


def original_s(case: CaseRow) -> float:
    """The original's best, whether its search found it or its authors stored it."""
    key = (case.model, case.mode, case.num_gpus, case.minibatch)
    return min(case.best_s, STORED_S.get(key, math.inf))


def run_full(cases: list[CaseRow], profile: PaperProfile) -> FullRow:
    """Plan in our own space for one question, and compare with the modes of the original."""
    first = cases[0]
    best = min(cases, key=original_s)
    plans = [
        search(profile, case.mode, case.num_gpus, case.minibatch, case.memory_nbytes).plan
        for case in cases
    ]
    graph, costs = to_layers(profile)
    machine = machine_of(first.num_gpus, first.memory_nbytes)
    began = time.process_time()
    plan = choose(graph, costs, machine, first.minibatch)
    plan_s = time.process_time() - began
    bounds = lower_bound(graph, costs, machine, first.minibatch).seconds
    again = sum(
        min(cost.forward_s / size for size, cost in sizes.items()) for sizes in costs.by_layer
    )
    return FullRow(
        first.model,
        first.num_gpus,
        first.minibatch,
        original_s(best),
        best.mode,
        min(estimate_s(profile, other, prefetch=True) for other in plans),
        plan.step_s,
        plan.describe()[0],
        bounds["compute"],
        bounds["compute"] + again * first.minibatch / first.num_gpus,
        max(bounds["h2d"], bounds["d2h"]),
        plan_s,
    )


def show_full(rows: list[FullRow]) -> None:
    """Print two lines a question, and a summary."""
    print(
        f"{'model':11s}{'GPUs':>4s}{'D':>5s}{'original s':>14s}{'prefetch s':>11s}{'ours s':>9s}"
        f"{'ratio':>7s}{'ratio':>7s}{'compute s':>10s}{'twice s':>9s}{'links s':>8s}"
        f"{'plan s':>7s}"
    )
    for row in rows:
        print(
            f"{row.model:11s}{row.gpus:4d}{row.minibatch:5d}{row.original_s:11.3f}"
            f" {row.original_mode}{row.prefetch_s:11.3f}{row.step_s:9.3f}{row.ratio:7.3f}"
            f"{row.prefetch_ratio:7.3f}{row.compute_bound_s:10.3f}{row.twice_s:9.3f}"
            f"{row.link_bound_s:8.3f}{row.plan_s:7.1f}  {' '.join(row.missed)}"
        )
        print(f"    {row.plan}")
    print(
        f"{len(rows)} questions: geometric mean {mean([row.ratio for row in rows]):.4f} of the"
        f" throughput that the original reports, {mean([r.prefetch_ratio for r in rows]):.4f} of"
        f" its with prefetch; {mean([r.step_s / r.compute_bound_s for r in rows]):.4f} times the"
        f" pure compute, {mean([r.step_s / r.twice_s for r in rows]):.4f} times that with"
        " every forward twice"
    )


def inclusive(packs: Sequence[Pack]) -> list[tuple[int, int]]:
    """Packs as the original writes them, with the last layer."""
    return [(pack.first, pack.last - 1) for pack in packs]


def mean(ratios: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def show(rows: list[Row]) -> None:
    """Print two lines a case, and a summary."""
    print(
        f"{'model':11s}{'mode':5s}{'GPUs':>4s}{'D':>5s}{'original s':>11s}{'ours s':>9s}"
        f"{'ratio':>7s}{'bound s':>9s}{'memory MiB':>11s}{'search s':>9s}{'original':>9s}"
    )
    for row in rows:
        print(
            f"{row.model:11s}{row.mode:5s}{row.gpus:4d}{row.minibatch:5d}{row.original_s:11.3f}"
            f"{row.step_s:9.3f}{row.ratio:7.3f}{row.lower_bound_s:9.3f}"
            f"{row.memory_nbytes / 2**20:11.0f}{row.search_s:9.3f}{row.original_search_s:9.3f}"
            f"  {' '.join(row.missed)}"
        )
        for name, size, packs in (
            ("F", row.forward_size, row.forward_packs),
            ("B", row.backward_size, row.backward_packs),
        ):
            print(f"    U_{name} = {size}, P_{name} = {json.dumps(packs)}")
    print(f"{summary(rows)}")


def summary(rows: list[Row]) -> str:
    """One line for all rows."""
    best = mean([row.original_s / row.lower_bound_s for row in rows])
    slowest = max(row.search_s / row.original_search_s for row in rows)
    num_worse = sum("worse" in row.missed for row in rows)
    return (
        f"{len(rows)} cases: {num_worse} worse; geometric mean {mean([r.ratio for r in rows]):.4f}"
        f" of the original's throughput (no plan of this space gets beyond {best:.4f});"
        f" search in at most {slowest:.3f} of its time"
    )


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profiles", required=True, help="folder of MODEL.json files")
    parser.add_argument("--cases", required=True, help="CSV file of the original's results")
    parser.add_argument("--full", action="store_true", help="plan in our own space of decisions")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    try:
        cases = read_cases(arguments.cases)
        if not cases:
            raise PlanError(f"{arguments.cases} has no cases")
        run_some = run_all_full if arguments.full else run_all
        rows = run_some(cases, Profiles(arguments.profiles))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mean_ratio = mean([row.ratio for row in rows])
    if arguments.json:
        found = [{**asdict(row), "ratio": row.ratio, "missed": row.missed} for row in rows]
        print(json.dumps({"rows": found, "mean_ratio": mean_ratio}, indent=2))
    elif arguments.full:
        show_full([row for row in rows if isinstance(row, FullRow)])
    else:
        show([row for row in rows if isinstance(row, Row)])
    return 0 if mean_ratio > 1 and not any(row.missed for row in rows) else 1


def run_all(cases: list[CaseRow], profiles: Profiles) -> list[Row | FullRow]:
    """Search in the original's space, case by case."""
    rows: list[Row | FullRow] = []
    for case in cases:
        with naming(f"{case.model} {case.mode} on {case.num_gpus} GPUs"):
            rows.append(run(case, profiles[case.model]))
    return rows


def run_all_full(cases: list[CaseRow], profiles: Profiles) -> list[Row | FullRow]:
    """Plan in our space, once for all modes of a question."""
    questions: dict[tuple[str, int, int, int], list[CaseRow]] = {}
    for case in cases:
        key = (case.model, case.num_gpus, case.minibatch, case.memory_nbytes)
        questions.setdefault(key, []).append(case)
    rows: list[Row | FullRow] = []
    for (model, num_gpus, *_), same in questions.items():
        with naming(f"{model} on {num_gpus} GPUs"):
            rows.append(run_full(same, profiles[model]))
    return rows


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in an error which case it was."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{what}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
