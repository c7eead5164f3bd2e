"""Corrects costs and bandwidths by what steps really took.

A step's predicted and measured timelines have the same instructions, so each tells by what factor
the prediction of a pack, a link or an update was off. The factor of a pack goes to all its layers:
what a plan cannot tell apart, it need not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harmony.core.machine import Machine
from harmony.core.timeline import Span, Timeline
from harmony.planner.ir.schedule import Instruction, Op, Schedule
from harmony.planner.ir.tasks import Pack, TaskKind
from harmony.planner.predict.cost import CostTable, LayerCost

MOST = 8.0
"""A factor beyond this, or below its inverse, says more about the measurement than of the work."""

SMALL_COPY_NBYTES = 1 << 16
"""A copy of fewer bytes than this measures latencies, not the bandwidth."""

Factors = dict[int, float]
"""By layer: measured seconds over predicted seconds."""


@dataclass(frozen=True)
class Measured:
    """What the same instruction was predicted to take, and took in a typical step."""

    instruction: Instruction
    program: int
    predicted_s: float
    measured_s: float
    nbytes: int


@dataclass(frozen=True)
class Refined:
    """Costs and machine as the steps have shown them to be.

    Attributes:
        worst: the largest factor by which a pack, an update or a link was off, at least 1.
    """

    costs: CostTable
    machine: Machine
    worst: float


def refine(
    schedule: Schedule,
    costs: CostTable,
    machine: Machine,
    predicted: Timeline,
    measured: Sequence[Timeline],
) -> Refined:
    """Return what explains the measured steps of a schedule better.

    Args:
        predicted: the timeline that ``costs`` and ``machine`` give the schedule.
        measured: timelines of steps under it.
    """
    found = list(_compare(schedule, predicted, measured))
    forward = _factors(found, TaskKind.FORWARD)
    update = _factors(found, TaskKind.UPDATE, TaskKind.LATE_UPDATE)
    backward = _backward_factors(found, costs, forward)
    links = _link_factors(found)
    table = tuple(
        {
            size: _scaled(cost, _of(forward, layer), _of(backward, layer), _of(update, layer))
            for size, cost in sizes.items()
        }
        for layer, sizes in enumerate(costs.by_layer)
    )
    every = [*forward.values(), *backward.values(), *update.values(), *links.values()]
    worst = max((max(f, 1 / f) for f in every), default=1.0)
    return Refined(CostTable(table), _with_links(machine, links), worst)


def _compare(
    schedule: Schedule, predicted: Timeline, measured: Sequence[Timeline]
) -> Iterable[Measured]:
    """Pair the spans of a prediction with the medians of those that were measured."""
    taken: dict[tuple[str, int], list[float]] = {}
    for timeline in measured:
        for span in timeline.spans:
            taken.setdefault((span.lane, span.index), []).append(span.duration_s)
    programs = list(schedule.all_programs())
    numbers = {name: number for number, (name, _) in enumerate(programs)}
    for span in predicted.spans:
        seconds = taken.get((span.lane, span.index))
        if seconds and span.duration_s > 0:
            number = numbers[span.lane.partition(".")[0]]
            yield _measured(span, programs[number][1][span.index], number, seconds)


def _measured(
    span: Span, instruction: Instruction, program: int, seconds: Sequence[float]
) -> Measured:
    typical = statistics.median(seconds)
    return Measured(instruction, program, span.duration_s, typical, span.nbytes)


def _factors(found: Iterable[Measured], *kinds: TaskKind) -> Factors:
    """Factors of the layers of tasks of some kinds: of all microbatches of a pack together."""
    totals: dict[Pack, list[float]] = {}
    for item in found:
        task = item.instruction.task
        if task is not None and task.kind in kinds:
            total = totals.setdefault(task.pack, [0.0, 0.0])
            total[0] += item.predicted_s
            total[1] += item.measured_s
    return {
        layer: _bounded(measured_s / predicted_s)
        for pack, (predicted_s, measured_s) in totals.items()
        for layer in pack
    }


def _backward_factors(
    found: Iterable[Measured], costs: CostTable, forward: Mapping[int, float]
) -> Factors:
    """Factors of the backwards alone: what a recompute takes is known from the forwards.

    A pack without a FORWARD task of its own tells of both together only.
    """
    whole = _factors(found, TaskKind.BACKWARD)
    saved = {
        item.instruction.task.pack
        for item in found
        if item.instruction.task is not None and any(ref.is_kept for ref in item.instruction.reads)
    }
    kept = {layer for pack in saved for layer in pack}
    factors = {}
    for layer, factor in whole.items():
        sizes = costs.by_layer[layer]
        if not sizes or layer in kept or layer not in forward:
            factors[layer] = factor
            continue
        cost = sizes[max(sizes)]
        alone_s = factor * (cost.forward_s + cost.backward_s) - forward[layer] * cost.forward_s
        factors[layer] = _bounded(alone_s / cost.backward_s) if cost.backward_s else factor
    # Its forward is measured nowhere else, so it is taken to be off as much.
    return factors


def _link_factors(found: Iterable[Measured]) -> dict[tuple[int, Op], float]:
    """By device and direction: how much longer copies took."""
    totals: dict[tuple[int, Op], list[float]] = {}
    for item in found:
        if item.nbytes >= SMALL_COPY_NBYTES and item.instruction.task is None:
            total = totals.setdefault((item.program, item.instruction.op), [0.0, 0.0])
            total[0] += item.predicted_s
            total[1] += item.measured_s
    return {key: _bounded(total[1] / total[0]) for key, total in totals.items()}


def _with_links(machine: Machine, factors: Mapping[tuple[int, Op], float]) -> Machine:
    devices = []
    for index, device in enumerate(machine.devices):
        h2d = factors.get((index, Op.SWAP_IN), 1.0)
        d2h = factors.get((index, Op.SWAP_OUT), 1.0)
        p2p = factors.get((index, Op.SEND), 1.0)
        devices.append(
            replace(
                device,
                h2d_bytes_per_s=device.h2d_bytes_per_s / h2d,
                d2h_bytes_per_s=device.d2h_bytes_per_s / d2h,
                p2p_bytes_per_s=device.p2p_bytes_per_s / p2p,
            )
        )
    return replace(machine, devices=tuple(devices))


def _scaled(cost: LayerCost, forward: float, backward: float, update: float) -> LayerCost:
    return replace(
        cost,
        products_s=cost.products_s * forward,
        forward_s=cost.forward_s * forward,
        backward_s=cost.backward_s * backward,
        update_s=cost.update_s * update,
    )


def _of(factors: Mapping[int, float], layer: int) -> float:
    return factors.get(layer, 1.0)


def _bounded(factor: float) -> float:
    return min(MOST, max(1 / MOST, factor))
