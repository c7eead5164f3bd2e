"""What one step of training carries around while its programs run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from harmony.planner.tasks import TensorKind
from harmony.runtime.hostmem import Stash
from harmony.runtime.randomness import RandomStates
from harmony.runtime.signals import Signals
from harmony.timeline import Span

HostValues = dict[tuple[TensorKind, int], Stash]
"""Host copies of values and of their gradients."""


@dataclass
class Step:
    """One run of a schedule.

    Attributes:
        random: the microbatches' random states.
        minibatch: samples of the step, to weigh the loss of a microbatch by its size.
        before_updates: events that the host waits for before its first update.
        started_s: host clock when the step began; spans count from it.
        spans: what the host programs did; devices add theirs when the step is over.
        running: per program, the text of the instruction that it issues now, for errors.
    """

    signals: Signals
    random: RandomStates
    minibatch: int
    before_updates: tuple[int, ...] = ()
    started_s: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    running: dict[str, str] = field(default_factory=dict)

    def now_s(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.started_s
