#!/usr/bin/env python
"""Which of PyTorch's operators run on the virtual GPU, and whether with CPU's bits.

Runs every entry of PyTorch's operator database (``op_db``) on its own samples, forward and
backward, on the CPU and on a virtual GPU, and compares. Each operator runs in a worker process
under a time limit, so that one that crashes does not end the sweep.

    python scripts/vgpu_coverage.py                  # all, five minutes on two cores
    python scripts/vgpu_coverage.py --only mm nn.functional.conv2d
    python scripts/vgpu_coverage.py --write-docs     # and renew the table of docs/virtual-gpu.md

The exit code is 1 if fewer than 98 % agree, or if any result is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import selectors
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from operator_check import GOOD, MEANING, Verdict, check, database, first_line

BAR = 0.98
STARTUP_S = 120.0  # a worker's first operator also pays for building the virtual GPU
DOCS = Path(__file__).parents[1] / "docs" / "virtual-gpu.md"
BEGIN, END = "<!-- coverage: begin -->", "<!-- coverage: end -->"


def work() -> None:
    """Read names from standard input and write a verdict in JSON for each; runs in a worker."""
    from harmony.vgpu import api as vgpu

    verdicts = os.fdopen(os.dup(1), "w")  # operators may print
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    vgpu.virtual_gpus(count=2, memory="4GiB")
    operators = database()
    for line in sys.stdin:
        begin = time.monotonic()
        name = line.strip()
        try:
            verdict = check(operators[name])
        except Exception as error:
            traceback.print_exc()
            verdict = Verdict(name, "raises", "the samples: " + first_line(error))
        verdict.took_s = round(time.monotonic() - begin, 2)
        verdicts.write(json.dumps(asdict(verdict)) + "\n")
        verdicts.flush()


class Worker:
    """A worker process and the operator it is busy with."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            self.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VGPU_COVERAGE_TRACEBACK") else subprocess.DEVNULL,
            text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.name = ""
        self.deadline = 0.0

    def command(self) -> list[str]:
        """Return what to start."""
        return [sys.executable, __file__, "--worker"]

    def start(self, name: str, limit_s: float) -> None:
        """Hand it an operator."""
        assert self.process.stdin
        self.name, self.deadline = name, time.monotonic() + limit_s
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()

    def result(self) -> Verdict:
        """Read the verdict, or what the death of the process means."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return Verdict(**json.loads(line))
        return Verdict(self.name, "crash", f"the process ended with code {self.process.wait()}")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.communicate()


def sweep(names: Iterable[str], num_jobs: int, limit_s: float,
          tell: Callable[[Verdict], None]) -> list[Verdict]:  # fmt: skip
    """Check operators in worker processes; one that dies or exceeds the limit is replaced."""
    waiting, verdicts = collections.deque(names), []
    selector = selectors.DefaultSelector()

    def launch(worker: Worker | None = None) -> None:
        if not waiting:
            if worker:
                worker.stop()
            return
        worker = worker or Worker()
        worker.start(waiting.popleft(), limit_s + (0 if worker.name else STARTUP_S))
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore

    for _ in range(num_jobs):
        launch()
    while selector.get_map():
        ready = {key.data for key, _ in selector.select(timeout=1)}
        for worker in [key.data for key in selector.get_map().values()]:
            late = time.monotonic() > worker.deadline
            if worker not in ready and not late:
                continue
            selector.unregister(worker.process.stdout)
            verdict = worker.result() if worker in ready else Verdict(
                worker.name, "crash", f"did not end within {limit_s:.0f} s")  # fmt: skip
            verdicts.append(verdict)
            tell(verdict)
            if verdict.outcome == "crash":
                worker.stop()
            launch(None if verdict.outcome == "crash" else worker)
    return sorted(verdicts, key=lambda v: v.name)


# ---------------------------------------------------------------- the report


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return one line: how many operators agree, of how many."""
    counts = collections.Counter(v.outcome for v in verdicts)
    good = sum(counts[outcome] for outcome in GOOD)
    detail = ", ".join(f"{counts[key]} {key}" for key in MEANING if counts[key])
    return f"{good} of {len(verdicts)} operators agree ({good / len(verdicts):.1%}): {detail}"


def passes(verdicts: Sequence[Verdict]) -> bool:
    """Return whether the bar is met and nothing is wrong."""
    good = sum(v.outcome in GOOD for v in verdicts)
    return good >= BAR * len(verdicts) and all(v.outcome != "wrong" for v in verdicts)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Return the section of the documentation: counts, and all that is not identical."""
    counts = collections.Counter(v.outcome for v in verdicts)
    lines = [f"PyTorch {torch.__version__.split('+')[0]}: {summary(verdicts)}.", "",
             "| outcome | operators | meaning |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {key} | {counts[key]} | {text} |" for key, text in MEANING.items()]
    lines += ["", "| operator | outcome | reason |", "|---|---|---|"]
    for v in verdicts:
        if v.outcome != "identical":
            reason = re.sub(r"\s+", " ", v.reason).replace("|", "\\|")
            lines.append(f"| `{v.name}` | {v.outcome} | {reason} |")
    return "\n".join(lines)


def write_docs(verdicts: Sequence[Verdict]) -> None:
    """Replace the table between the markers of ``docs/virtual-gpu.md``."""
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{markdown(verdicts)}\n{END}{after}", encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these operators only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--limit", type=float, default=120, help="seconds for an operator")
    parser.add_argument("--write-docs", action="store_true", help="renew docs/virtual-gpu.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def tell(verdict: Verdict) -> None:
    """Print a line of the table."""
    if verdict.outcome != "identical":
        print(f"{verdict.name:<48} {verdict.outcome:<10} {verdict.reason}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep and print what is not identical, then the summary."""
    arguments = parse_arguments(argv)
    if arguments.worker:
        work()
        return 0
    known = sorted(database())
    names = arguments.only or known
    if unknown := set(names) - set(known):
        print(f"not in the database: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    verdicts = sweep(names, arguments.jobs, arguments.limit, tell)
    print(summary(verdicts))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(v) for v in verdicts], indent=1))
    if arguments.write_docs:
        write_docs(verdicts)
    return 0 if passes(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
