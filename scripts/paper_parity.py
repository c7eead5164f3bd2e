#!/usr/bin/env python3
"""Our form of the original's estimator against what the original's said of its own schedules.

    scripts/paper_parity.py --profiles DIR --schedules CSV [--json]

DIR holds a profile MODEL.json for each model of the table. Per schedule: bytes per link, by closed
forms and by adding up the estimator's events; step time without and with prefetch across tasks;
peak memory. Bars: bytes exact, times and memory within 1 %; the estimates that the authors printed
(two GPUs, 32 samples, without prefetch) within 1 %. All of these are estimates, not measurements.
Exits 1 if a bar is missed, 2 if something cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from harmony.errors import PlanError
from research.original.estimator import estimate_events, estimate_s
from research.original.profile import PaperProfile
from research.original.tables import Profiles, ScheduleRow, read_schedules
from research.original.traffic import closed_forms, peak_nbytes

BAR = 0.01
RECORDED_S = {
    ("bert_large", "DP"): 4.608,
    ("bert_large", "PP"): 4.399,
    ("bert_96", "DP"): 19.421,
    ("bert_96", "PP"): 17.874,
    ("gpt2_xl", "DP"): 43.927,
    ("gpt2_xl", "PP"): 42.298,
}
"""Seconds of a step that the authors recorded for ``D32_v*_N2_Top1``, without prefetch."""


@dataclass(frozen=True)
class Result:
    """What was found for one schedule; errors are shares of the original's figure."""

    model: str
    schedule: str
    is_exact: bool
    wrong_nbytes: tuple[str, ...]
    plain_s: float
    plain_error: float
    prefetch_s: float
    prefetch_error: float
    memory_nbytes: int
    memory_error: float
    recorded_error: float | None

    @property
    def passes(self) -> bool:
        """Whether every bar is met."""
        errors = [self.plain_error, self.prefetch_error, self.memory_error]
        errors += [] if self.recorded_error is None else [self.recorded_error]
        return self.is_exact and max(map(abs, errors)) <= BAR


def compare(row: ScheduleRow, profile: PaperProfile) -> Result:
    """Estimate one schedule, and compare."""
    expected, closed = asdict(row.traffic), asdict(closed_forms(profile, row.plan))
    added_up = asdict(estimate_events(profile, row.plan, prefetch=False)[1])
    wrong = [name for name in expected if not expected[name] == closed[name] == added_up[name]]
    plain_s = estimate_s(profile, row.plan, prefetch=False)
    prefetch_s = estimate_s(profile, row.plan, prefetch=True)
    memory = peak_nbytes(profile, row.plan)
    recorded = None
    if row.name == f"D32_v{row.plan.mode}_N2_Top1":
        recorded = RECORDED_S.get((row.model, row.plan.mode))
    return Result(
        row.model,
        row.name,
        not wrong,
        tuple(wrong),
        plain_s,
        plain_s / row.plain_s - 1,
        prefetch_s,
        prefetch_s / row.prefetch_s - 1,
        round(memory),
        memory / row.memory_nbytes - 1,
        None if recorded is None else plain_s / recorded - 1,
    )


def show(results: list[Result]) -> None:
    """Print one row a schedule, and a summary."""
    print(
        f"{'model':11s}{'schedule':29s}{'bytes':>7s}{'plain s':>10s}{'off %':>9s}"
        f"{'prefetch s':>11s}{'off %':>9s}{'memory GB':>10s}{'off %':>9s}{'recorded %':>11s}"
    )
    for result in results:
        recorded = "" if result.recorded_error is None else f"{100 * result.recorded_error:.4f}"
        mark = "" if result.passes else "  MISSED " + " ".join(result.wrong_nbytes)
        print(
            f"{result.model:11s}{result.schedule:29s}{'exact' if result.is_exact else 'wrong':>7s}"
            f"{result.plain_s:10.4f}{100 * result.plain_error:9.4f}"
            f"{result.prefetch_s:11.4f}{100 * result.prefetch_error:9.4f}"
            f"{result.memory_nbytes / 1e9:10.3f}{100 * result.memory_error:9.4f}"
            f"{recorded:>11s}{mark}"
        )
    num_passed = sum(result.passes for result in results)
    num_exact = sum(result.is_exact for result in results)
    worst = [
        100 * max(abs(getattr(result, name)) for result in results)
        for name in ("plain_error", "prefetch_error", "memory_error")
    ]
    print(
        f"{num_passed} of {len(results)} schedules meet the bars; bytes exact on {num_exact};"
        f" off at most {worst[0]:.4f} % without prefetch, {worst[1]:.4f} % with,"
        f" memory {worst[2]:.4f} %"
    )


def main() -> int:
    """Compare all schedules."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--profiles", required=True, help="folder of MODEL.json files")
    parser.add_argument("--schedules", required=True, help="CSV file of schedules")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    try:
        rows = read_schedules(arguments.schedules)
        if not rows:
            raise PlanError(f"{arguments.schedules} has no schedules")
        profiles = Profiles(arguments.profiles)
        results = []
        for row in rows:
            try:
                results.append(compare(row, profiles[row.model]))
            except PlanError as error:
                raise PlanError(f"{row.model}, {row.name}: {error}") from None
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        found = [{**asdict(result), "passes": result.passes} for result in results]
        print(json.dumps(found, indent=2))
    else:
        show(results)
    return 0 if all(result.passes for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
