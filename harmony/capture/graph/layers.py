"""Cuts a trace into layers: the boundaries at which a plan may part the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import pairwise

from harmony.capture.graph.trace import Step, StepKind, Trace

_LARGE_SHARE = 1 / 100


def cut_layers(
    trace: Trace, param_nbytes: Mapping[str, int], inseparable: AbstractSet[int] = frozenset()
) -> tuple[int, ...]:
    """Return the index of the first step of each layer.

    Every call of a leaf module with parameters, and every functional step that uses a large
    parameter directly, is the anchor of a layer of its own. What stands between two anchors is
    parted where the fewest bytes cross; what follows the last one (the loss, for instance) belongs
    to it.

    Args:
        param_nbytes: bytes of each parameter, by name.
        inseparable: numbers of values that may not cross layers.
    """
    large = sum(param_nbytes.values()) * _LARGE_SHARE
    anchors = [i for i, step in enumerate(trace.steps) if _is_anchor(step, param_nbytes, large)]
    crossing = _crossing_nbytes(trace)
    forbidden = _forbidden(trace)
    for number in inseparable:
        forbidden.update(range(trace.producer[number] + 1, trace.last_use[number] + 1))
    starts = [0]
    for anchor, following in pairwise(anchors):
        allowed = [cut for cut in range(anchor + 1, following + 1) if cut not in forbidden]
        if allowed:
            starts.append(min(allowed, key=lambda cut: (crossing[cut], -cut)))
    return tuple(starts)


def changed_storages(steps: list[Step], trace: Trace) -> frozenset[int]:
    """Return the storages that the steps change in place."""
    changed = (after for step in steps for _, after in step.mutated)
    return frozenset(trace.values[number].storage for number in changed)


def _is_anchor(step: Step, param_nbytes: Mapping[str, int], large: float) -> bool:
    own = sum(param_nbytes.get(name, 0) for name in step.state)
    return own > 0 and (step.kind is StepKind.MODULE or own >= large)


def _crossing_nbytes(trace: Trace) -> list[int]:
    """Per cut, the bytes of the values made before it that are used after it."""
    change = [0] * (len(trace.steps) + 2)
    for number, value in enumerate(trace.values):
        if trace.producer[number] >= 0:
            change[trace.producer[number] + 1] += value.nbytes
            change[trace.last_use[number] + 1] -= value.nbytes
    crossing, alive = [], 0
    for delta in change:
        alive += delta
        crossing.append(alive)
    return crossing


def _forbidden(trace: Trace) -> set[int]:
    """Cuts across which two names of one memory are alive that is changed in place after it.

    And cuts between two uses of a buffer, or two calls of a module, that the forward changes.
    """
    last_change: dict[int, int] = {}
    for index, step in enumerate(trace.steps):
        for _, after in step.mutated:
            last_change[trace.values[after].storage] = index
    names: dict[int, list[int]] = {}
    for number, value in enumerate(trace.values):
        if value.storage in last_change:
            names.setdefault(value.storage, []).append(number)
    forbidden = set()
    for storage, numbers in names.items():
        for cut in range(last_change[storage] + 1):
            alive = [n for n in numbers if trace.producer[n] < cut <= trace.last_use[n]]
            if len(alive) > 1:
                forbidden.add(cut)
    return forbidden.union(*(range(low + 1, high + 1) for low, high in _spans_of_changes(trace)))


def _spans_of_changes(trace: Trace) -> Iterator[tuple[int, int]]:
    """First and last step that use a buffer, or call a module, that some step changes."""
    users: dict[object, list[int]] = {}
    for index, step in enumerate(trace.steps):
        for used in (*step.state, step.target, *step.counts):
            users.setdefault(used, []).append(index)
    changed: set[object] = {name for step in trace.steps for name in step.changes}
    changed |= {attribute for step in trace.steps for attribute in step.counts}
    changed |= {step.target for step in trace.steps if step.counts}
    for thing in changed:
        yield users[thing][0], users[thing][-1]
