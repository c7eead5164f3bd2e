"""What `harmony-run` collects from the script that it runs.

`harmony-run` opens a session with its options; a model that is made meanwhile reads them
(`harmony.core.options`), registers itself, and reports its plan and every step. Without
`harmony-run` the options are the defaults and a model keeps its record to itself.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harmony.core.options import Options, current_options, use
from harmony.core.timeline import Timeline
from harmony.core.units import format_seconds
from harmony.errors import printable

if TYPE_CHECKING:
    from harmony.core.layergraph import LayerGraph
    from harmony.planner.ir.plan import Plan
    from harmony.planner.ir.schedule import Schedule
    from harmony.planner.predict.cost import CostTable
    from harmony.profiling.model_profile import ModelProfile

LOG = logging.getLogger("harmony")
"""Plans as ``INFO``, steps as ``DEBUG``, what `say` says as ``WARNING``."""

KEPT_STEPS = 1000
"""Durations that a run keeps to take the median from."""

KEPT_RUNS = 8
"""Plans that a record keeps; those that ran least are forgotten first."""


@dataclass(frozen=True)
class StepStats:
    """One training step as it was measured; where a step accumulates, one of its backwards.

    Attributes:
        step: its number, from 0. In a loop of one's own a step is the optimizer's, and the
            backwards whose gradients add up have the same number.
        loss: the loss of the minibatch; None where the script computes it itself.
        num_samples: samples of the minibatch.
        num_tokens: tokens of the minibatch; None where the inputs are not tokens.
        step_s: seconds of the whole call, as the script sees it.
        timeline: what ran when.
        schedule: what ran, where it is not the plan's own: in a loop of one's own, the backward
            from the outputs that a gradient has come for.
    """

    step: int
    loss: float | None
    num_samples: int
    num_tokens: int | None
    step_s: float
    timeline: Timeline
    schedule: Schedule | None = None


@dataclass
class PlanRun:
    """A plan and the steps that ran under it, in bounded memory.

    Attributes:
        layers: what the plan was made from: the layers and their costs; None if unknown.
        last: what ran when in the last step, and `ran`, the schedule of that.
    """

    plan: Plan
    predicted: Timeline
    layers: tuple[LayerGraph, CostTable] | None = None
    num_steps: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    total_s: float = 0.0
    last: Timeline | None = None
    ran: Schedule | None = None
    durations_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))

    def add(self, stats: StepStats) -> None:
        """Count one more step."""
        self.num_steps += 1
        self.num_samples += stats.num_samples
        self.num_tokens += stats.num_tokens or 0
        self.total_s += stats.step_s
        self.durations_s.append(stats.step_s)
        self.last, self.ran = stats.timeline, stats.schedule

    def median_s(self) -> float | None:
        """Seconds of a typical step, without the first, which warms up; None before any ran."""
        durations = list(self.durations_s)
        if 1 < self.num_steps <= KEPT_STEPS:
            durations = durations[1:]
        return statistics.median(durations) if durations else None


class Observer:
    """Hears of every plan and every step of a model (`Harmony.add_observer`).

    It is called in the thread that trains, so that what takes long makes training slower. What it
    raises ends the call: a `train_step` is over by then, and a backward of a loop of one's own
    hands out no gradients.
    """

    def planned(self, record: ModelRecord) -> None:
        """The next steps follow another plan: ``record.plan``."""

    def stepped(self, record: ModelRecord, stats: StepStats) -> None:
        """A step is over."""


class PlanOnly(BaseException):
    """Ends the script once its first plan is known, under ``--plan-only``.

    A BaseException, so that a script's ``except Exception`` does not swallow it.
    """

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(f"{record.name} is planned")
        self.record = record


class Verified(BaseException):
    """Ends the script once its first step has been compared, under ``--verify``.

    A BaseException, so that a script's ``except Exception`` does not swallow it.
    """

    def __init__(self, verification: Any) -> None:
        """Carry a `harmony.verification.verification.Verification`."""
        super().__init__(verification.summary())
        self.verification = verification


@dataclass
class ModelRecord:
    """All that the report says about one model.

    Attributes:
        name: class of the module.
        facts: what to show in the header, label to text, e.g. ``"parameters": "50.4 M"``.
        runs: the plans that were used.
        warnings: what the user should know, in the order it was found; each once.
        profile: returns the layers and costs that the plan in use was made from; None before
            there is one.
        resumed: whether a `harmony.Run` has looked for a checkpoint of it.
        planned_for: in words what the plan is for and from, where it is not for this machine.
        observers: of this model alone.
        num_steps: steps that were counted, and `num_batches`, the batches in them.
        total_steps: how many steps the run has, where a `harmony.Progress` has said so.
        forward_s: under ``--plan-only``, predicted seconds of a forward of its own.
    """

    name: str
    facts: dict[str, str]
    runs: list[PlanRun] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_batches: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    profile: Callable[[], ModelProfile] | None = None
    planned_for: tuple[str, ...] = ()
    forward_s: float = 0.0
    resumed: bool = False
    observers: list[Observer] = field(default_factory=list)
    total_steps: int | None = None
    _current: PlanRun | None = None
    _last_step: int | None = None

    @property
    def run(self) -> PlanRun | None:
        """The plan that took most of the time: the one worth a report."""
        return max(self.runs, key=lambda run: run.total_s, default=None)

    @property
    def plan(self) -> Plan | None:
        """The plan in use."""
        return self._current.plan if self._current else None

    @property
    def graph(self) -> LayerGraph | None:
        """The layers that the plan in use was made from."""
        held = None if self._current is None else self._current.layers
        return None if held is None else held[0]

    @property
    def schedule(self) -> Schedule | None:
        """The schedule in use."""
        return self._current.plan.schedule if self._current else None

    @property
    def predicted(self) -> Timeline | None:
        """What the plan in use expects."""
        return self._current.predicted if self._current else None

    def planned(
        self,
        plan: Plan,
        predicted: Timeline,
        layers: tuple[LayerGraph, CostTable] | None = None,
    ) -> None:
        """Note that the next steps follow ``plan``; noting a known plan again is fine.

        Args:
            layers: what it was made from.

        Raises:
            PlanOnly: under ``--plan-only``.
        """
        known = next((run for run in self.runs if run.plan is plan), None)
        self._current = known or PlanRun(plan, predicted, layers)
        if known is None:
            self.runs.append(self._current)
            self._forget()
            LOG.info("%s: planned, %s a step expected", self.name, format_seconds(plan.step_s))
            for observer in (*_session.observers, *self.observers):
                observer.planned(self)
        if current_options().plan_only:
            raise PlanOnly(self)

    def stepped(self, stats: StepStats) -> None:
        """Count a finished step of the plan in use."""
        if self._current is None:
            raise RuntimeError("a step cannot finish before planned() was called")
        self._current.add(stats)
        self.num_batches += 1
        self.num_steps += stats.step != self._last_step
        self._last_step = stats.step
        if stats.loss is not None:
            self.last_loss = stats.loss
            if self.first_loss is None:
                self.first_loss = stats.loss
        LOG.debug("%s: step %d, loss %s, %.4g s", self.name, stats.step, stats.loss, stats.step_s)
        for observer in (*_session.observers, *self.observers):
            observer.stepped(self, stats)

    def warn(self, message: str) -> None:
        """Show ``message`` in the report, once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def _forget(self) -> None:
        """Keep the plans that ran most, and the one in use."""
        others = [run for run in self.runs if run is not self._current]
        if len(others) >= KEPT_RUNS:
            self.runs.remove(min(others, key=lambda run: run.total_s))


@dataclass
class Keeping:
    """What a `harmony.Run` of the session has kept, for what is said at the end.

    Attributes:
        folder: of its checkpoints; None if it saves none.
        num_steps: that it has counted.
        saved_steps: how many of them are in a checkpoint.
    """

    folder: Path | None = None
    num_steps: int = 0
    saved_steps: int = 0


@dataclass
class _Session:
    records: list[ModelRecord] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)
    keepings: list[Keeping] = field(default_factory=list)
    say: Callable[[str], None] | None = None


_session = _Session()


def register(name: str, facts: dict[str, str]) -> ModelRecord:
    """Return the record of a new model; a session keeps it for the report at the end.

    Without `harmony-run` only the caller holds it, so that it goes when the model goes.
    """
    record = ModelRecord(name, dict(facts))
    if current_options().active:
        _session.records.append(record)
    return record


def records() -> list[ModelRecord]:
    """Models of the running session, in the order they were made."""
    return list(_session.records)


def observe(observer: Observer) -> None:
    """Let ``observer`` hear of every plan and step until the session ends."""
    _session.observers.append(observer)


def keepings() -> list[Keeping]:
    """Of each `harmony.Run` of the running session, in the order they were made."""
    return _session.keepings


def keep(keeping: Keeping) -> Keeping:
    """Note a new `harmony.Run`; only `harmony-run` asks for it at the end."""
    if current_options().active:
        _session.keepings.append(keeping)
    return keeping


def hear(say: Callable[[str], None]) -> None:
    """Let ``say`` show what `say` is given until the session ends."""
    _session.say = say


def say(text: str) -> None:
    """Tell the user something that is no warning: on standard error, if nothing else hears it.

    `harmony-run` hears it, and so does whoever has set up `logging`.
    """
    if _session.say is not None:
        _session.say(text)
        return
    if LOG.hasHandlers():
        LOG.warning(text)
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, full, or not there
        sys.stderr.write(f"harmony: {printable(text)}\n")


def activate(options: Options) -> None:
    """Start a session with ``options`` and no records."""
    global _session
    use(options)
    _session = _Session()


def deactivate() -> None:
    """End the session: default options, no records, no observers."""
    activate(Options())


@contextmanager
def running(options: Options) -> Iterator[None]:
    """Run the block in a session of its own; the session before it goes on afterwards."""
    global _session
    before = _session, current_options()
    activate(options)
    try:
        yield
    finally:
        _session = before[0]
        use(before[1])
