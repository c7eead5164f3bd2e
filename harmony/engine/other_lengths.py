"""Another length of a model that is known: its costs and plans follow, nothing is measured again.

Two captures are kin if they have the same layers, and values of the same form but for their
bytes. Bytes inside of layers are then bounded by those of the known one: whatever grows with the
length grows at most with its square. Seconds are scaled, and corrected by the first steps.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from harmony.core.layergraph import LayerGraph
from harmony.core.machine import Machine
from harmony.errors import DoesNotFitError
from harmony.planner.ir.plan import Plan
from harmony.planner.predict.cost import CostTable, LayerCost
from harmony.planner.search.candidates import Candidate
from harmony.planner.search.search import ask, choose
from harmony.planner.search.trial import TooLarge, Trial

LONGEST, SHORTEST = 1.25, 0.6
"""How much longer, or shorter, a length may be than one that was measured: beyond that the bounds
are too far from the bytes, and it is measured itself."""

_OF_ITS_LENGTH = {
    "name",
    "signature",
    "nbytes_per_sample",
    "nbytes_fixed",
    "saved_nbytes_per_sample",
    "products_nbytes_per_sample",
}
"""What the parts of kin may differ in."""


def ratio_between(graph: LayerGraph, known: LayerGraph) -> float | None:
    """By how much the values of a graph are larger than those of its kin; None if they are none.

    The largest ratio of all, since some values do not grow with the length.
    """
    if len(graph.layers) != len(known.layers) or len(graph.values) != len(known.values):
        return None
    if _settled(graph, {"layers", "values"}) != _settled(known, {"layers", "values"}):
        return None
    parts = (*zip(graph.layers, known.layers, strict=True),)
    if any(_kind(a.signature) != _kind(b.signature) for a, b in parts):
        return None
    every = (*parts, *zip(graph.values, known.values, strict=True))
    if any(_settled(a, _OF_ITS_LENGTH) != _settled(b, _OF_ITS_LENGTH) for a, b in every):
        return None
    ratios = []
    for a, b in zip(graph.values, known.values, strict=True):
        for new, old in (
            (a.nbytes_per_sample, b.nbytes_per_sample),
            (a.nbytes_fixed, b.nbytes_fixed),
        ):
            if bool(new) != bool(old):
                return None
            ratios += [new / old] if old else []
    ratio = max(ratios, default=1.0)
    return ratio if min(ratios, default=1.0) >= SHORTEST and ratio <= LONGEST else None


def stretched(costs: CostTable, ratio: float) -> CostTable:
    """Return costs of values so many times as large: bytes from above, seconds about."""
    most = max(1.0, ratio) ** 2

    def of(cost: LayerCost) -> LayerCost:
        return LayerCost(
            cost.forward_s * ratio,
            cost.backward_s * ratio,
            cost.update_s,
            math.ceil(cost.forward_nbytes * most),
            math.ceil(cost.saved_nbytes * most),
            math.ceil(cost.backward_nbytes * most),
            math.ceil(cost.products_nbytes * most),
            cost.products_s * ratio,
        )

    return CostTable(
        tuple({size: of(cost) for size, cost in layer.items()} for layer in costs.by_layer)
    )


def adapted(
    graph: LayerGraph, costs: CostTable, machine: Machine, plan: Plan, activations: str
) -> Plan | None:
    """Return a kin's plan for this graph, or one with the same bits; None if none fits.

    Args:
        activations: as for `harmony.planner.search.search.choose`.
    """
    try:
        return _relowered(graph, costs, machine, plan) or choose(
            graph,
            costs,
            machine,
            plan.minibatch,
            activations=activations,
            phase=plan.spec.phase,
            like=plan,
        )
    except DoesNotFitError:
        return None


def _relowered(graph: LayerGraph, costs: CostTable, machine: Machine, plan: Plan) -> Plan | None:
    """Return the same packs and policy for another graph; None if they do not fit."""
    question = ask(graph, costs, machine, plan.minibatch, phase=plan.spec.phase, like=plan)
    trial = Trial(question)
    tried = trial.tried(Candidate(plan.mode, plan.spec, plan.policy))
    if isinstance(tried, TooLarge):
        return None
    fitting = trial.verified(tried)
    timeline = fitting.timeline
    return replace(
        plan,
        machine=machine,
        schedules=fitting.schedules,
        step_s=timeline.step_s,
        peak_nbytes=tuple(timeline.peak_nbytes),
        host_nbytes=fitting.host_nbytes,
        traffic=timeline.bytes_by(),
        alternatives=(),
        model=graph.fingerprint,
        bound_s=0.0,
        bound_reason="",
    )


def same_updates(machine: Machine, other: Machine) -> bool:
    """Whether updates may be on the devices of both, with the same bits."""
    pairs = zip(machine.devices, other.devices, strict=True)
    same = all(bool(a.update_bytes_per_s) == bool(b.update_bytes_per_s) for a, b in pairs)
    return same and machine.updates_alike == other.updates_alike


def _settled(part: Any, without: set[str]) -> list[object]:
    return [getattr(part, f.name) for f in fields(part) if f.name not in without]


def _kind(signature: str) -> str:
    return signature.partition(":")[0]
