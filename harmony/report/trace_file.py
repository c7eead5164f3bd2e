"""Timelines as a trace file for Perfetto (ui.perfetto.dev) and chrome://tracing.

Each timeline is a process, each stream a lane in it, so that the predicted and the measured step
lie one above the other on the same time axis. An arrow leads from each copy to a device to the
first work that reads it, and a counter shows each device's memory. The format is Chrome's "Trace
Event Format".
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from harmony.core.timeline import Span, Timeline
from harmony.report.memory import MemoryUse

STREAM_ORDER = ("compute", "h2d", "d2h", "p2p", "update")
"""The order of a device's lanes, from the top."""


def trace_events(
    timelines: Mapping[str, Timeline], memory: Mapping[str, MemoryUse] | None = None
) -> dict[str, Any]:
    """Return the JSON object of a trace file.

    Args:
        timelines: name of the process to timeline, e.g. ``{"predicted": ..., "measured": ...}``.
        memory: by the same names, what the devices' memory is for.

    Returns:
        ``{"traceEvents": [...], "displayTimeUnit": "ms"}``; times in it are microseconds.
    """
    events: list[dict[str, Any]] = []
    for pid, (process, timeline) in enumerate(timelines.items(), 1):
        events.append(_metadata("process_name", pid, 0, name=process))
        events.append(_metadata("process_sort_index", pid, 0, sort_index=pid))
        lanes = sorted(timeline.lanes(), key=lane_order)
        for tid, lane in enumerate(lanes, 1):
            events.append(_metadata("thread_name", pid, tid, name=lane))
            events.append(_metadata("thread_sort_index", pid, tid, sort_index=tid))
            events.extend(_event(span, pid, tid) for span in timeline.on(lane))
        events.extend(_arrows(timeline, pid, {lane: tid for tid, lane in enumerate(lanes, 1)}))
        events.extend(_counters(timeline, pid, (memory or {}).get(process)))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lane_order(lane: str) -> tuple[bool, int, str, int]:
    """Sort key: devices by number, the host last, and a device's streams in ``STREAM_ORDER``."""
    device, _, stream = lane.partition(".")
    digits = device.lstrip("abcdefghijklmnopqrstuvwxyz:")
    number = int(digits) if digits.isdigit() else 0
    place = STREAM_ORDER.index(stream) if stream in STREAM_ORDER else len(STREAM_ORDER)
    return (device == "host", number, device, place)


def _event(span: Span, pid: int, tid: int) -> dict[str, Any]:
    args: dict[str, Any] = {"index": span.index}
    if span.nbytes:
        args["nbytes"] = span.nbytes
        if span.duration_s > 0:
            args["GB/s"] = round(span.nbytes / span.duration_s / 1e9, 3)
    return {
        "ph": "X",
        "name": span.label,
        "cat": span.kind,
        "pid": pid,
        "tid": tid,
        "ts": span.start_s * 1e6,
        "dur": span.duration_s * 1e6,
        "args": args,
    }


def _arrows(timeline: Timeline, pid: int, tids: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Two events for each copy to a device: where it begins, and where what it brings is read."""
    for lane in (lane for lane in tids if lane.endswith(".h2d")):
        compute = f"{lane.removesuffix('.h2d')}.compute"
        waiting: dict[str, deque[Span]] = {}
        for copy in timeline.on(lane):
            waiting.setdefault(copy.label.removeprefix("SwapIn "), deque()).append(copy)
        for run in timeline.on(compute):
            for ref in set(_READS.sub(r"\1", run.label).split()) & waiting.keys():
                # What is not there yet comes later, for another work, once this has been dropped.
                while waiting[ref] and waiting[ref][0].end_s <= run.start_s:
                    copy = waiting[ref].popleft()
                    name = f"{pid}.{tids[lane]}.{copy.index}"
                    arrow = {"cat": copy.kind, "name": ref, "id": name, "pid": pid}
                    yield {**arrow, "ph": "s", "tid": tids[lane], "ts": copy.start_s * 1e6}
                    end = {"ph": "f", "bp": "e", "tid": tids[compute], "ts": run.start_s * 1e6}
                    yield {**arrow, **end}


_READS = re.compile(r"^Run \S+ \((.*?)\).*$")
"""What a Run reads, in its text."""


def _counters(timeline: Timeline, pid: int, memory: MemoryUse | None) -> Iterator[dict[str, Any]]:
    for gpu in range(0 if memory is None else len(memory.usage)):
        assert memory is not None
        for seconds, nbytes in memory.over_time(gpu, timeline):
            counter = {"ph": "C", "name": f"gpu{gpu} memory", "pid": pid}
            yield {**counter, "ts": seconds * 1e6, "args": {"MiB": nbytes / 2**20}}


def _metadata(kind: str, pid: int, tid: int, /, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}
