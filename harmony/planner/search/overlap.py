"""Which updates a step leaves to the next one, where each hides behind the forwards before it.

The norm by which gradients are clipped is complete only when the backward ends, so with clipping
no update can hide behind the backward; without it the last ones cannot: those of the first packs.
Which they are changes nothing that a step computes, so it is decided once all else is.
"""

from __future__ import annotations

from dataclasses import replace

from harmony.core.units import format_seconds
from harmony.errors import DoesNotFitError
from harmony.planner.ir.plan import Decision, Plan
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Schedule
from harmony.planner.ir.tasks import Pack, Phase, TaskKind
from harmony.planner.predict.bottleneck import bottleneck
from harmony.planner.search.trial import Fitting, TooLarge, Trial

NAME = "late updates"
OWN_STEP = "in their own step"

CLOSE = 1.03
"""A prediction is about this exact: updates that wait for a norm are left unless that is clearly
slower."""


def with_late_updates(plan: Plan, best: Fitting, trial: Trial) -> Plan:
    """Return the plan with as many updates left to the next step as make it faster."""
    packs = updated_on_host(best.schedules[Phase.TRAIN])
    found = [fitting for late in _choices(packs, trial) if (fitting := _tried(best, late, trial))]
    fastest = chosen(best, found, trial.question.machine.updates_wait)
    others = [each for each in (best, *found) if each is not fastest]
    others.sort(key=lambda fitting: fitting.timeline.step_s)
    times = tuple((_words(each), each.timeline.step_s) for each in others)
    decision = Decision(NAME, _words(fastest), _why(fastest, best), times)
    spec, schedules, timeline = fastest.tried.candidate.spec, fastest.schedules, fastest.timeline
    bound, advice = bottleneck(timeline, schedules[Phase.TRAIN], spec)
    return replace(
        plan,
        spec=spec,
        schedules=schedules,
        step_s=timeline.step_s,
        bound=bound,
        advice=advice,
        decisions=(*plan.decisions, decision),
    )


def chosen(best: Fitting, found: list[Fitting], updates_wait: bool) -> Fitting:
    """The fastest of the plan and of those with late updates, or one that is about as fast."""
    fastest = min([best, *found], key=lambda fitting: fitting.timeline.step_s)
    if fastest is best and found and updates_wait:
        left_s = found[0].timeline.step_s
        return found[0] if left_s <= CLOSE * best.timeline.step_s else best
    return fastest


def updated_on_host(schedule: Schedule) -> tuple[Pack, ...]:
    """The packs that a schedule updates on the host, in the order of their layers."""
    tasks = (step.task for step in schedule.host if step.task is not None)
    return tuple(sorted(task.pack for task in tasks if task.kind is TaskKind.UPDATE))


def _choices(packs: tuple[Pack, ...], trial: Trial) -> list[tuple[Pack, ...]]:
    """All packs; where updates need not wait for all gradients, only the first ones as well."""
    counts = {len(packs)}
    if not trial.question.machine.updates_wait:
        counts |= {1, len(packs) // 4, len(packs) // 2}
    return [packs[:count] for count in sorted(counts) if count and packs]


def _tried(best: Fitting, late: tuple[Pack, ...], trial: Trial) -> Fitting | None:
    """The plan with these packs late; None if it does not fit."""
    candidate = best.tried.candidate
    spec = replace(candidate.spec, late=late)
    tried = trial.tried(replace(candidate, spec=spec))
    try:
        return None if isinstance(tried, TooLarge) else trial.verified(tried)
    except DoesNotFitError:
        return None


def _words(fitting: Fitting) -> str:
    late = fitting.tried.candidate.spec.late
    if not late:
        return OWN_STEP
    return f"of {'1 pack' if len(late) == 1 else f'{len(late)} packs'} in the next step"


def _why(fastest: Fitting, best: Fitting) -> str:
    update_s = fastest.timeline.busy_s(f"{HOST}.{HOST_STREAM}")
    before_s, now_s = best.timeline.step_s, fastest.timeline.step_s
    if now_s >= before_s:
        return f"none of {format_seconds(update_s)} of updates would hide behind the next forward"
    return (
        f"of {format_seconds(update_s)} of updates, {format_seconds(before_s - now_s)} more hide "
        f"than in their own step; each is made just before the next forward of its pack"
    )
