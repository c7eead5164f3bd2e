"""Timelines as a trace file for Perfetto (ui.perfetto.dev) and chrome://tracing.

Each timeline is a process, each stream a lane in it, so that the predicted and the measured step
lie one above the other on the same time axis. The format is Chrome's "Trace Event Format".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harmony.core.timeline import Span, Timeline

STREAM_ORDER = ("compute", "h2d", "d2h", "p2p", "update")
"""The order of a device's lanes, from the top."""


def trace_events(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """Return the JSON object of a trace file.

    Args:
        timelines: name of the process to timeline, e.g. ``{"predicted": ..., "measured": ...}``.

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


def _metadata(kind: str, pid: int, tid: int, /, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}
