"""Says why a device did not compute, from a timeline that was predicted or measured.

Each gap between two Runs is explained by the copy that ended last among those that the second
Run, or a Drop before it, waited for. What remains after that copy is the host's: it issued late.
"""

from __future__ import annotations

from collections.abc import Mapping

from harmony.planner.schedule import HOST, HOST_STREAM, Instruction, Op, Schedule
from harmony.timeline import Span, Timeline

_WORK = (Op.RUN, Op.SWAP_IN, Op.SWAP_OUT, Op.SEND)
HOST_CAUSE = "host"
PEER_CAUSE = "peer"
UPDATE_CAUSE = "update"

Where = tuple[str, int]


def stall_causes(timeline: Timeline, schedule: Schedule) -> list[dict[str, float]]:
    """Return per device the seconds without a Run in the step, by cause.

    Causes are the kinds of copies that compute waited for (``weights``, ``gradients``,
    ``stash``, ``activations``, ``inputs``, ``outputs``), ``peer`` for a copy from another
    device, ``update`` for the end of the step when only the host still works, and ``host`` for
    what nothing else explains.
    """
    spans = {(span.lane, span.index): span for span in timeline.spans}
    sources = _sources(schedule)
    return [
        _device_stalls(f"gpu{index}", program, spans, sources, timeline)
        for index, program in enumerate(schedule.programs)
    ]


def _sources(schedule: Schedule) -> dict[int, Where]:
    """Per event the last work before its Record on its stream: lane and position."""
    found: dict[int, Where] = {}
    for name, program in schedule.all_programs():
        last: dict[str, Where] = {}
        for index, step in enumerate(program):
            lane = f"{name}.{step.stream}"
            if step.op in _WORK:
                last[lane] = (lane, index)
            elif step.op is Op.RECORD and step.event is not None and lane in last:
                found[step.event] = last[lane]
    return found


def _device_stalls(
    name: str,
    program: tuple[Instruction, ...],
    spans: Mapping[Where, Span],
    sources: Mapping[int, Where],
    timeline: Timeline,
) -> dict[str, float]:
    lane, stalls = f"{name}.compute", dict[str, float]()
    free_s = 0.0
    awaited: list[Span] = []
    for index, step in enumerate(program):
        if step.stream != "compute":
            continue
        source = sources.get(step.event) if step.event is not None else None
        if step.op is Op.WAIT and source is not None and source in spans:
            awaited.append(spans[source])
        run = spans.get((lane, index)) if step.op is Op.RUN else None
        if run is not None:
            _explain(stalls, free_s, run.start_s, awaited)
            free_s, awaited = max(free_s, run.end_s), []
    _explain_end(stalls, free_s, name, timeline)
    return stalls


def _explain(stalls: dict[str, float], free_s: float, start_s: float, awaited: list[Span]) -> None:
    """Divide a gap between the copy that ended last and the host."""
    if start_s <= free_s:
        return
    late = max(awaited, key=lambda span: span.end_s, default=None)
    known_s = free_s
    if late is not None and late.end_s > free_s:
        known_s = min(late.end_s, start_s)
        cause = PEER_CAUSE if late.lane.endswith(".p2p") else late.kind
        stalls[cause] = stalls.get(cause, 0.0) + known_s - free_s
    if start_s > known_s:
        stalls[HOST_CAUSE] = stalls.get(HOST_CAUSE, 0.0) + start_s - known_s


def _explain_end(stalls: dict[str, float], free_s: float, name: str, timeline: Timeline) -> None:
    """After its last Run a device waits for its gradients to leave, then for the others."""
    out_s = max((span.end_s for span in timeline.on(f"{name}.d2h")), default=free_s)
    update_s = max(
        (span.end_s for span in timeline.on(f"{HOST}.{HOST_STREAM}")), default=free_s
    )
    peers_s = max(
        (s.end_s for s in timeline.spans if s.lane.endswith(".compute")), default=free_s
    )
    # In this order: while another device computes, that is what the update waits for too.
    ends = (("gradients", out_s), (PEER_CAUSE, peers_s), (UPDATE_CAUSE, update_s))
    for cause, end_s in (*ends, (HOST_CAUSE, timeline.step_s)):
        if end_s > free_s:
            stalls[cause] = stalls.get(cause, 0.0) + end_s - free_s
            free_s = end_s
