"""What one step of training carries around while its programs run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harmony.core.timeline import Span
from harmony.planner.ir.tasks import Samples, TensorKind
from harmony.runtime.exec.signals import Signals
from harmony.runtime.host.late_updates import LateUpdates
from harmony.runtime.host.pinned_memory import Stash
from harmony.runtime.peers.exchange import Exchange
from harmony.runtime.step.recompute import ReplayState
from harmony.runtime.step.self_check import SelfCheck

HostValues = dict[tuple[TensorKind, int], Stash]
"""Host copies of values and of their gradients."""

Weights = Mapping[tuple[int, Samples], float]
"""Per scalar output and microbatch, its factor in the sum that is the whole batch's."""


@dataclass
class Step:
    """One run of a schedule.

    Attributes:
        replay: the microbatches' random states, and what layers change.
        weights: how much the scalars of each microbatch count.
        holds: whether updates are held back until all gradients are there.
        before_updates: events that say so; the host waits for them where it holds updates back,
            or leaves some to the next step.
        approval: the event by which the host says that updates may begin, where they were held
            back.
        waits: whether the optimizer wants all gradients before the first update.
        late: the updates that the step before has left, for the schedule to make first.
        apply_updates: whether there are updates at all.
        approve: is called once all gradients are there, before they are clipped, where the
            optimizer waits for them; may raise.
        loss_scale: what the loss is multiplied by for the backward.
        exchange: of the gradients with other processes; None where there are none.
        check: takes the figures of what is made twice, in the first run of a schedule.
        approved: is called before the first update where they were held back.
        started_s: host clock when the step began; spans count from it.
        spans: what the host programs did; devices add theirs when the step is over.
        running: per program, the text of the instruction that it issues now, for errors.
        threads: per program, the number of the thread that runs it.
        updated: the updates that have begun, on the host and on devices.
        finished: programs that have come to their end.
    """

    signals: Signals
    replay: ReplayState
    weights: Weights
    holds: bool = False
    before_updates: tuple[int, ...] = ()
    approval: int = -1
    waits: bool = False
    late: LateUpdates | None = None
    apply_updates: bool = True
    approve: Callable[[], None] = lambda: None
    loss_scale: float = 1.0
    exchange: Exchange | None = None
    check: SelfCheck | None = None
    approved: Callable[[], None] = lambda: None
    started_s: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    running: dict[str, str] = field(default_factory=dict)
    threads: dict[str, int] = field(default_factory=dict)
    updated: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    @property
    def holds_updates(self) -> bool:
        """Whether updates run only after all gradients are there, or not at all."""
        return self.holds or not self.apply_updates

    def now_s(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.started_s
