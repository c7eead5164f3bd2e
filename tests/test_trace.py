"""Trace files: what Perfetto needs is there, and nothing of the timeline is lost."""

from __future__ import annotations

import json

from harmony.core.timeline import Span, Timeline
from harmony.report.trace_file import lane_order, trace_events

MEASURED = Timeline(
    spans=[
        Span("host.update", "Run U[0:2]", "update", 0.003, 0.004, index=1),
        Span("gpu0.h2d", "SwapIn W[0:2]", "weights", 0.0, 0.001, nbytes=8_000_000, index=0),
        Span("gpu0.compute", "Run F[0:2]@0:4", "forward", 0.001, 0.003, index=2),
        Span("gpu10.compute", "Run B[2:4]@0:4", "backward", 0.001, 0.002, index=0),
        Span("gpu2.d2h", "SwapOut dW[0:2]%0", "gradients", 0.002, 0.002, nbytes=4, index=3),
    ],
    step_s=0.004,
)


def test_every_span_becomes_one_event_with_its_times_in_microseconds() -> None:
    events = trace_events({"measured": MEASURED})["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(spans) == len(MEASURED.spans)
    forward = spans["Run F[0:2]@0:4"]
    assert (forward["ts"], forward["cat"]) == (1000.0, "forward")
    assert round(forward["dur"], 6) == 2000.0
    assert spans["SwapIn W[0:2]"]["args"] == {"index": 0, "nbytes": 8_000_000, "GB/s": 8.0}
    assert "GB/s" not in spans["SwapOut dW[0:2]%0"]["args"], "no rate for an instant"


def test_predicted_and_measured_are_two_processes_with_named_lanes() -> None:
    trace = trace_events({"predicted": MEASURED, "measured": MEASURED})
    events = trace["traceEvents"]
    processes = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert processes == {"predicted": 1, "measured": 2}
    lanes = [e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2]
    assert lanes == ["gpu0.compute", "gpu0.h2d", "gpu2.d2h", "gpu10.compute", "host.update"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named


def test_the_file_is_plain_json() -> None:
    trace = trace_events({"measured": MEASURED})
    assert json.loads(json.dumps(trace)) == trace


def test_an_empty_timeline_is_an_empty_process() -> None:
    events = trace_events({"measured": Timeline()})["traceEvents"]
    assert [event["name"] for event in events] == ["process_name", "process_sort_index"]


def test_lanes_are_in_the_order_of_the_devices_then_the_host() -> None:
    lanes = ["host.update", "gpu10.compute", "gpu2.p2p", "gpu2.compute", "gpu0.d2h", "gpu0.h2d"]
    assert sorted(lanes, key=lane_order) == [
        "gpu0.h2d", "gpu0.d2h", "gpu2.compute", "gpu2.p2p", "gpu10.compute", "host.update",
    ]  # fmt: skip
