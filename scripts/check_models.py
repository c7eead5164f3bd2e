#!/usr/bin/env python3
"""Trains every model of the zoo with Harmony and with plain PyTorch, and compares them.

    scripts/check_models.py [--only NAME ...] [--family WORD] [--write]

Each model trains three steps on two virtual GPUs in a plan of at least four packs, dropout on, the
race checker on; loss, gradients, buffers and parameters are compared after each step (see
`tests/zoo/check.py`). Prints a table; exits 1 if any model differs by more than its entry allows,
or is not trained unless its entry says that it is refused, by name. ``--write`` puts the table
into docs/models.md.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

import harmony
from tests.zoo import ZOO, Entry
from tests.zoo.check import NUM_DEVICES, NUM_STEPS, Outcome, check

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: scripts/check_models.py --write -->", "<!-- end of the table -->"
KINDS = ("loss", "gradient", "buffer")


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        failure: why it could not be trained or compared, in a line; empty if it could.
        refused: whether Harmony refused it by name, as its entry says.
        skipped: which package is missing; empty if none is.
    """

    entry: Entry
    outcome: Outcome | None
    seconds: float
    failure: str = ""
    skipped: str = ""
    refused: bool = False

    @property
    def passed(self) -> bool:
        """Whether all that the entry asks for holds."""
        if self.skipped or self.refused:
            return True
        return self.outcome is not None and not self.outcome.misses

    @property
    def verdict(self) -> str:
        """One word."""
        if self.skipped:
            return "skipped"
        if self.refused:
            return "refused"
        return "ok" if self.passed else "MISSED"


def main() -> int:
    """Run the models, print the table, and return 1 if one misses."""
    args = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)  # what libraries say of tiny configurations
    console = Console(width=None if sys.stdout.isatty() else 140)
    entries = chosen(args.only, args.family)
    rows = []
    for number, entry in enumerate(entries, 1):
        row = run(entry, args.traceback)
        rows.append(row)
        console.print(f"{number:3}/{len(entries)}  {entry.name:20} {row.seconds:5.1f} s  ", end="")
        console.print(row.verdict, row.failure or row.skipped, markup=False)
    console.print(table(rows))
    for row in rows:
        for miss in () if row.outcome is None else row.outcome.misses[:3]:
            console.print(f"{row.entry.name}: {miss}", markup=False)
    if args.write:
        write(rows)
    missed = [row.entry.name for row in rows if not row.passed]
    trained = sum(row.outcome is not None and row.passed for row in rows)
    console.print(f"{trained} of {len(rows)} models are trained as plain PyTorch trains them")
    console.print(f"{sum(row.refused for row in rows)} are refused by name, as expected")
    if missed:
        console.print(f"missed: {', '.join(missed)}", markup=False)
    return 1 if missed else 0


def chosen(names: Sequence[str] | None, family: str | None) -> list[Entry]:
    """The entries that were asked for; exits with a message for an unknown name."""
    unknown = set(names or ()) - set(ZOO)
    if unknown:
        sys.exit(f"no such model: {', '.join(sorted(unknown))}. There are: {', '.join(ZOO)}")
    entries = [ZOO[name] for name in names] if names else list(ZOO.values())
    return [entry for entry in entries if family is None or family in entry.family]


def run(entry: Entry, show_traceback: bool) -> Row:
    """Check one model; whatever goes wrong becomes part of the row."""
    started = time.perf_counter()
    missing = entry.missing()
    if missing is not None:
        return Row(entry, None, 0.0, skipped=missing)
    failure, outcome, refused = "", None, False
    try:
        outcome = check(entry)
    except harmony.HarmonyError as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
        refused = bool(entry.refused) and entry.refused in str(error)
    except Exception as error:  # every model gets its row
        if show_traceback:
            traceback.print_exc()
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    gc.collect()
    return Row(entry, outcome, time.perf_counter() - started, failure, refused=refused)


def cells(row: Row) -> Iterator[str]:
    """The columns of a row, as text."""
    outcome = row.outcome
    yield row.entry.name
    if outcome is None:
        yield from ("", "", "", "", *("" for _ in KINDS), "", row.verdict)
        return
    yield outcome.capture_mode
    yield f"{outcome.layers}"
    yield f"{outcome.packs}"
    yield f"{outcome.num_params / 1000:.0f}"
    for kind in KINDS:
        yield describe(outcome.differences.get(kind))
    yield f"{row.seconds:.1f}"
    yield row.verdict


def describe(difference: float | None) -> str:
    """A difference as text; nothing to compare is a dash."""
    if difference is None:
        return "-"
    return "0" if difference == 0.0 else f"{difference:.0e}"


COLUMNS = ("model", "capture mode", "layers", "packs", "params (k)", *KINDS, "s", "")


def table(rows: Sequence[Row]) -> Table:
    """The table for the terminal."""
    found = Table(title=f"{NUM_STEPS} steps on {NUM_DEVICES} virtual GPUs against plain PyTorch")
    for column in COLUMNS:
        found.add_column(
            column, justify="left" if column in ("model", "capture mode", "") else "right"
        )
    family = None
    for row in rows:
        if row.entry.family != family:
            family = row.entry.family
            found.add_section()
            found.add_row(f"[bold]{family}")
        found.add_row(*cells(row))
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The tables for the document, one a family, with the reasons for what is not bit for bit."""
    lines: list[str] = []
    families = dict.fromkeys(row.entry.family for row in rows)
    for family in families:
        lines += [f"### {family}", ""]
        heads = ("model", "shows", "capture mode", "layers", "packs", "params (k)", *KINDS)
        lines.append(f"| {' | '.join(heads)} |")
        lines.append(f"|{'---|' * 3}{'---:|' * (len(heads) - 3)}")
        for row in rows:
            if row.entry.family == family:
                name, capture_mode, *figures = list(cells(row))[: 5 + len(KINDS)]
                mark = " *" if row.entry.tolerance else ""
                shown = capture_mode or row.skipped or row.failure
                lines.append(
                    f"| {name}{mark} | {row.entry.shows} | {shown} | {' | '.join(figures)} |"
                )
        lines.append("")
    return "\n".join([*lines, *reasons(rows)])


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why some models may differ in their last bits."""
    by_reason: dict[tuple[str, float], list[str]] = {}
    for row in rows:
        if row.entry.tolerance:
            key = (row.entry.reason, row.entry.tolerance)
            by_reason.setdefault(key, []).append(row.entry.name)
    yield "Models marked * may differ in the last bits, relative to the largest entry:"
    for (reason, tolerance), names in by_reason.items():
        yield f"- up to {tolerance:.0e}: {reason} ({', '.join(names)})"


def write(rows: Sequence[Row]) -> None:
    """Replace the table in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    refused = sum(row.refused for row in rows)
    passed = sum(row.passed for row in rows) - refused
    head = f"{passed} of {len(rows)} models; {refused} refused by name.\n\n"
    DOCUMENT.write_text(f"{before}{BEGIN}\n{head}{markdown(rows)}\n{END}{after}", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--family", metavar="WORD", help="only families whose heading has this")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    parser.add_argument("--traceback", action="store_true", help="print tracebacks of failures")
    args = parser.parse_args()
    if args.write and (args.only or args.family):
        parser.error("--write takes the whole zoo")
    return args


if __name__ == "__main__":
    sys.exit(main())
