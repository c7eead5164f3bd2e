"""`harmony-run doctor`: what this machine and this installation are like, for a bug report.

    harmony-run doctor [--json] [--checkpoint-dir DIR]

Trains nothing and changes nothing but a small file that it writes to measure the disk, and
removes. Exit codes: 0; 1 if something does not work; 2 for a command line that makes no sense.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.table import Table
from rich.text import Text

from harmony.cli.plan_arguments import Parser
from harmony.core.files import is_folder
from harmony.doctor.examine import probes
from harmony.doctor.findings import Finding, counted, findings_of
from harmony.errors import ConfigError, printable
from harmony.report.text import print_parts

FORMAT, VERSION = "harmony doctor", 1
_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def run(words: Sequence[str], out: TextIO) -> int:
    """Do what ``harmony-run doctor`` was asked for, writing to ``out``; return the exit code.

    Raises:
        ConfigError: if the words make no sense.
        SystemExit: after ``--help`` has been printed.
    """
    args = make_parser().parse_args(list(words))
    folder: Path | None = args.checkpoint_dir
    if folder is not None and folder.exists() and not is_folder(folder):
        raise ConfigError(f"--checkpoint-dir {folder}: that is no folder")
    findings = findings_of(probes(folder))
    if args.json:
        out.write(json.dumps(as_data(findings), indent=1) + "\n")
    else:
        print_parts([table(findings), conclusion(findings)], out)
    return int(_count(findings, "error") > 0)


def make_parser() -> Parser:
    """The options of ``harmony-run doctor``."""
    parser = Parser(prog="harmony-run doctor", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    parser.add_argument("--checkpoint-dir", metavar="DIR", type=Path, help="default: this folder")
    return parser


def as_data(findings: Sequence[Finding]) -> dict[str, object]:
    """The findings for programs."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "errors": _count(findings, "error"),
        "warnings": _count(findings, "warning"),
        "findings": [finding.to_json() for finding in findings],
    }


def table(findings: Sequence[Finding]) -> Table:
    """A line for each finding, and below it the remedy."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column(max_width=18)
    rows.add_column(ratio=1, overflow="fold")
    for finding in findings:
        text = Text(printable(finding.text))
        if finding.remedy:
            text.append(f"\n-> {printable(finding.remedy)}", style=_STYLES[finding.status])
        rows.add_row(Text(finding.status, style=_STYLES[finding.status]), finding.name, text)
    return rows


def conclusion(findings: Sequence[Finding]) -> Text:
    """How many of them are not as they should be."""
    errors, warnings = _count(findings, "error"), _count(findings, "warning")
    return Text(f"{counted(errors, 'error')}, {counted(warnings, 'warning')}")


def _count(findings: Sequence[Finding], status: str) -> int:
    return sum(finding.status == status for finding in findings)
