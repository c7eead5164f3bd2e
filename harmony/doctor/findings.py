"""Findings of probes: each probe ends in lines, whatever happens to it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from harmony.errors import printable, text_of

Status = Literal["ok", "warning", "error"]

PATIENCE_S = 60.0
"""Seconds that a probe may take: a driver or a network disk that hangs answers nothing."""


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        name: what was looked at.
        text: what it is like.
        remedy: what to do about it; empty where there is nothing to do.
        figures: the same for programs.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def ok(name: str, text: str, /, **figures: Any) -> Finding:
    """Say that something is as it should be."""
    return Finding(name, "ok", text, "", figures)


def warning(name: str, text: str, remedy: str, /, **figures: Any) -> Finding:
    """Say that something could be better."""
    return Finding(name, "warning", text, remedy, figures)


def error(name: str, text: str, remedy: str, /, **figures: Any) -> Finding:
    """Say that something does not work."""
    return Finding(name, "error", text, remedy, figures)


def counted(count: int, what: str) -> str:
    """``"1 file"``, ``"2 files"``."""
    return f"{count} {what}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Probe:
    """Something to look at.

    Attributes:
        name: the name of its finding, if it fails.
        look: returns or yields what it finds.
        remedy: what to do where it fails.
        essential: whether nothing can be trained without it.
    """

    name: str
    look: Callable[[], Iterator[Finding] | Sequence[Finding]]
    remedy: str = "this part of the machine cannot be looked at; training does not depend on it"
    essential: bool = False

    def failed(self, text: str) -> Finding:
        """What is found where the probe itself fails."""
        return Finding(self.name, "error" if self.essential else "warning", text, self.remedy)


def findings_of(probes: Sequence[Probe], patience_s: float = PATIENCE_S) -> list[Finding]:
    """Run probes one after the other; one that fails or hangs is a finding of its own."""
    return [finding for probe in probes for finding in _run(probe, patience_s)]


def _run(probe: Probe, patience_s: float) -> list[Finding]:
    found: list[Finding] = []

    def look() -> None:
        try:
            found.extend(probe.look())
        except BaseException as failure:
            why = f"{type(failure).__name__}: {' '.join(printable(text_of(failure)).split())}"
            found.append(probe.failed(f"it cannot be looked at: {why}"))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # A thread of its own that nobody has to wait for: what hangs in a driver cannot be ended.
        thread = threading.Thread(target=look, name=f"doctor: {probe.name}", daemon=True)
        thread.start()
        thread.join(patience_s)
    if thread.is_alive():
        late = probe.failed(f"no answer within {patience_s:.0f} s")
        remedy = f"look again when the machine is idle; if it stays so, {late.remedy}"
        return [*found, replace(late, remedy=remedy)]
    # What libraries warn of on import (an old driver above all) is a finding as well.
    texts = {" ".join(str(w.message).split()) for w in said if issubclass(w.category, UserWarning)}
    return found + [warning(probe.name, text, probe.remedy) for text in sorted(texts)]
