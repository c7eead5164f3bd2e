"""A plugin of pytest that tells who runs it of each test as it ends, by a pipe.

`HARMONY_REPORTS` is the pipe's number. What was told stays when the run is ended.
"""

from __future__ import annotations

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line for a test that has ended, and for what failed around it."""
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash is not None else report.longreprtext[-200:]
    why = why.partition("\n")[0][:200] if report.failed else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "why": why}
    os.write(int(os.environ["HARMONY_REPORTS"]), (json.dumps(line) + "\n").encode())
