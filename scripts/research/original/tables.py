"""Tables of the original's schedules and search results, read from CSV files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harmony.core.files import read_text
from harmony.errors import PlanError
from harmony.planner.ir.tasks import Pack
from research.original.four_tuple import FourTuple, Mode
from research.original.profile import PaperProfile, read_profile
from research.original.traffic import Traffic

T = TypeVar("T")
_TRAFFIC = ("W_h2d", "dW_d2h_sim", "X_h2d", "X_d2h", "p2p", "ARD", "dW_d2h_runtime")
"""Columns of the fields of `Traffic`, in their order."""


@dataclass(frozen=True)
class ScheduleRow:
    """One of the original's schedules, and what its estimator says of it.

    Attributes:
        model, name: the profile's name, and the schedule's.
        plan: the schedule.
        plain_s, prefetch_s: seconds of a step without and with prefetch across tasks.
        memory_nbytes: peak bytes of a GPU.
        traffic: bytes of a step.
    """

    model: str
    name: str
    plan: FourTuple
    plain_s: float
    prefetch_s: float
    memory_nbytes: int
    traffic: Traffic


@dataclass(frozen=True)
class CaseRow:
    """A question to a planner, and what the original's search found.

    Attributes:
        model, mode, num_gpus, minibatch, memory_nbytes: the question; bytes of a GPU.
        best_s, search_s: seconds of a step, and seconds that the search took.
    """

    model: str
    mode: Mode
    num_gpus: int
    minibatch: int
    memory_nbytes: int
    best_s: float
    search_s: float


def read_schedules(path: str | Path) -> list[ScheduleRow]:
    """Read a table of schedules.

    Raises:
        PlanError: if the file or a column is missing, or a row makes no sense; names the line.
    """
    columns = ("model", "schedule", "mode", "N", "D", "u_fwd", "u_bwd", "pack_fwd", "pack_bwd")
    needed = (*columns, "t_noprefetch_s", "t_prefetch_s", "mem_bytes", *_TRAFFIC)
    return list(_rows(Path(path), needed, _schedule))


def read_cases(path: str | Path) -> list[CaseRow]:
    """Read a table of search results.

    Raises:
        PlanError: if the file or a column is missing, or a row makes no sense; names the line.
    """
    columns = ("model", "minibatch", "mode", "gpus", "memory_cap_bytes")
    return list(_rows(Path(path), (*columns, "original_best_s", "original_search_s"), _case))


class Profiles:
    """The profiles of a folder, each read once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._read: dict[str, PaperProfile] = {}

    def __getitem__(self, model: str) -> PaperProfile:
        """The profile of a model.

        Raises:
            PlanError: if the folder has no good profile of it; names those that it has.
        """
        if model not in self._read:
            path = self.folder / f"{model}.json"
            if not path.is_file():
                known = ", ".join(sorted(found.stem for found in self.folder.glob("*.json")))
                raise PlanError(f"no profile of {model!r} in {self.folder}: {known or 'none'}")
            self._read[model] = read_profile(path)
        return self._read[model]


def _rows(
    path: Path, needed: Sequence[str], parse: Callable[[Mapping[str, str]], T]
) -> Iterator[T]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in needed if name not in (reader.fieldnames or ())]
    if missing:
        raise PlanError(f"{path} lacks the columns {', '.join(missing)}")
    for row in reader:
        try:
            if any(row[name] is None for name in needed):
                raise PlanError("it has fewer fields than columns")
            yield parse(row)
        except (ValueError, PlanError) as error:
            raise PlanError(f"{path}, line {reader.line_num}: {error}") from None


def _schedule(row: Mapping[str, str]) -> ScheduleRow:
    plan = FourTuple(
        _mode(row["mode"].removeprefix("v")),
        int(row["N"]),
        int(row["D"]),
        int(row["u_fwd"]),
        _packs(row["pack_fwd"]),
        int(row["u_bwd"]),
        _packs(row["pack_bwd"]),
    )
    traffic = Traffic(*(int(row[name]) for name in _TRAFFIC))
    times = _seconds(row["t_noprefetch_s"]), _seconds(row["t_prefetch_s"])
    found = (plan, *times, _positive(row["mem_bytes"]), traffic)
    return ScheduleRow(row["model"], row["schedule"], *found)


def _case(row: Mapping[str, str]) -> CaseRow:
    return CaseRow(
        row["model"],
        _mode(row["mode"]),
        _positive(row["gpus"]),
        _positive(row["minibatch"]),
        _positive(row["memory_cap_bytes"]),
        _seconds(row["original_best_s"]),
        _seconds(row["original_search_s"]),
    )


def _mode(text: str) -> Mode:
    if text == "DP":
        return "DP"
    if text == "PP":
        return "PP"
    raise PlanError(f"the mode is DP or PP, not {text!r}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise PlanError(f"{text!r} should be positive")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise PlanError(f"{text!r} are no seconds")
    return value


def _packs(text: str) -> tuple[Pack, ...]:
    """Packs from ``[[first, last], ...]``, the last layer included."""
    found: Any = json.loads(text)
    if not isinstance(found, list):
        raise PlanError(f"packs are a list, not {text!r}")
    for pair in found:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(layer, int) for layer in pair):
            raise PlanError(f"a pack is [first, last], not {pair!r}")
    return tuple(Pack(first, last + 1) for first, last in found)
