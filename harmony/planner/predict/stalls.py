"""Says why a device did not compute, from a timeline that was predicted or measured.

Each gap between two Runs is explained by the copy that ended last among those that the second
Run, or a Drop before it, waited for. While that copy was still queueing behind others on its
stream, the gap is theirs. What remains after it is the host's: it issued late.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from harmony.core.timeline import Span, Timeline
from harmony.planner.ir.schedule import HOST, HOST_STREAM, Instruction, Op, Schedule

_WORK = (Op.RUN, Op.SWAP_IN, Op.SWAP_OUT, Op.SEND)
HOST_CAUSE = "host"
PEER_CAUSE = "peer"
UPDATE_CAUSE = "update"
NEW_WEIGHTS_CAUSE = "new weights"

Where = tuple[str, int]


def stall_causes(timeline: Timeline, schedule: Schedule) -> list[dict[str, float]]:
    """Return per device the seconds without a Run in the step, by cause.

    Causes are the kinds of copies that compute waited for (``weights``, ``gradients``,
    ``stash``, ``saved``, ``activations``, ``inputs``, ``outputs``; ``new weights`` for those that
    a device has updated on their way out), ``peer`` for another device, ``update`` for the end of
    the step when only the host still works, and ``host`` for what nothing else explains.
    """
    record = _Record(timeline)
    sources = _sources(schedule)
    return [
        _device_stalls(f"gpu{index}", program, record, sources)
        for index, program in enumerate(schedule.programs)
    ]


class _Record:
    """The spans of a timeline, by place and by lane."""

    def __init__(self, timeline: Timeline) -> None:
        self.step_s = timeline.step_s
        self.spans = {(span.lane, span.index): span for span in timeline.spans}
        self.lanes: dict[str, list[Span]] = defaultdict(list)
        for span in sorted(timeline.spans, key=lambda span: (span.end_s, span.index)):
            self.lanes[span.lane].append(span)
        self.ends = {lane: [span.end_s for span in on] for lane, on in self.lanes.items()}

    def end_s(self, lane: str) -> float:
        """When the last span of a lane ends; 0 if there is none."""
        return self.ends[lane][-1] if lane in self.ends else 0.0

    def add_busy(self, stalls: dict[str, float], late: Span, low_s: float, high_s: float) -> None:
        """Divide a wait for ``late`` among what its lane did meanwhile; the rest is its own."""
        known_s = low_s
        for span in self.lanes[late.lane][bisect_left(self.ends[late.lane], low_s) :]:
            start_s, end_s = max(span.start_s, known_s), min(span.end_s, high_s)
            if end_s > start_s:
                _add(stalls, _cause(late), start_s - known_s)
                _add(stalls, _cause(span), end_s - start_s)
                known_s = end_s
            if span.start_s >= high_s:
                break
        _add(stalls, _cause(late), high_s - known_s)


def _cause(span: Span) -> str:
    if span.kind == "weights" and span.lane.endswith("d2h"):
        return NEW_WEIGHTS_CAUSE
    return span.kind if span.lane.endswith(("h2d", "d2h")) else PEER_CAUSE


def _add(stalls: dict[str, float], cause: str, seconds: float) -> None:
    if seconds > 0:
        stalls[cause] = stalls.get(cause, 0.0) + seconds


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
    record: _Record,
    sources: Mapping[int, Where],
) -> dict[str, float]:
    stalls: dict[str, float] = {}
    free_s = 0.0
    awaited: list[Span] = []
    for index, step in enumerate(program):
        if step.stream != "compute":
            continue
        if step.op is Op.WAIT and step.event is not None and step.event in sources:
            span = record.spans.get(sources[step.event])
            awaited += [] if span is None else [span]
        run = record.spans.get((f"{name}.compute", index)) if step.op is Op.RUN else None
        if run is not None:
            _explain(stalls, free_s, run.start_s, awaited, record)
            free_s, awaited = max(free_s, run.end_s), []
    _explain_end(stalls, free_s, name, record)
    return stalls


def _explain(
    stalls: dict[str, float], free_s: float, start_s: float, awaited: list[Span], record: _Record
) -> None:
    """Divide a gap between the copy that ended last and the host."""
    late = max(awaited, key=lambda span: span.end_s, default=None)
    known_s = free_s
    if late is not None and late.end_s > free_s and start_s > free_s:
        known_s = min(late.end_s, start_s)
        record.add_busy(stalls, late, free_s, known_s)
    _add(stalls, HOST_CAUSE, start_s - known_s)


def _explain_end(stalls: dict[str, float], free_s: float, name: str, record: _Record) -> None:
    """After its last Run a device waits for what is leaving it, then for the others."""
    leaving = record.lanes.get(f"{name}.d2h", [])
    if leaving and leaving[-1].end_s > free_s:
        record.add_busy(stalls, leaving[-1], free_s, leaving[-1].end_s)
        free_s = leaving[-1].end_s
    peers_s = max((record.end_s(lane) for lane in record.ends if "compute" in lane), default=0.0)
    ends = (
        # While another device computes, that is what the update waits for too.
        (PEER_CAUSE, peers_s),
        (UPDATE_CAUSE, record.end_s(f"{HOST}.{HOST_STREAM}")),
        (HOST_CAUSE, record.step_s),
    )
    for cause, end_s in ends:
        _add(stalls, cause, end_s - free_s)
        free_s = max(free_s, end_s)
