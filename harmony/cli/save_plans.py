"""Keeps what a session plans: the first plan and profile, in files."""

from __future__ import annotations

from collections.abc import Callable

from harmony.core.options import Options
from harmony.planner.ir.plan_file import save_plan
from harmony.profiling.model_profile import save_profile
from harmony.report.session import ModelRecord, Observer


class Keeper(Observer):
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
