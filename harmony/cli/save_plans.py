"""Keeps what a session plans: the first plan and profile in files, the plans to be shown."""

from __future__ import annotations

from collections.abc import Callable

from harmony.core.options import Options
from harmony.planner.ir.plan_file import save_plan
from harmony.profiling.catalog import known_gpu
from harmony.profiling.model_profile import ModelProfile, save_profile
from harmony.report.memory import memory_of
from harmony.report.plan_view import PlanView
from harmony.report.session import ModelRecord, StepStats


class Keeper:
    """Observes a session and writes the files that the command line asks for, at the first plan.

    At once and not at the end, so that they are there however the script ends.

    Args:
        say: hears of what was written.
    """

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self._plan = options.save_plan
        self._profile = options.save_profile
        self._say = say

    def planned(self, record: ModelRecord) -> None:
        """Write what has not been written yet.

        Raises:
            ConfigError: if it cannot be written.
        """
        if self._plan is not None and record.plan is not None:
            path, self._plan = self._plan, None
            save_plan(record.plan, path)
            self._say(f"plan written to {path}")
        if self._profile is not None and record.profile is not None:
            path, self._profile = self._profile, None
            save_profile(record.profile(), path)
            self._say(f"model profile written to {path}")

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """Nothing is kept of steps."""


def plan_view(record: ModelRecord) -> PlanView:
    """What is worth seeing of the plan of a model that was planned in this session.

    Raises:
        ValueError: if it has no plan yet.
    """
    run = record.run
    if run is None:
        raise ValueError(f"{record.name} has no plan yet: there is nothing to show")
    profile: ModelProfile | None = None if record.profile is None else record.profile()
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
        memory=None if profile is None else memory_of(run.plan, profile.graph, profile.costs),
        dtypes={} if profile is None else profile.dtypes,
    )
