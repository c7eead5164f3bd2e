"""Trace files: what Perfetto needs is there, and nothing of the timeline is lost."""

from __future__ import annotations

import json

from harmony.core.timeline import Span, Timeline
from harmony.planner.predict.simulate import simulate
from harmony.planner.search.search import choose
from harmony.report.memory import memory_of
from harmony.report.trace_file import lane_order, trace_events
from tests.toys import MIB, chain, server, uniform_costs

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


def test_an_arrow_leads_from_a_copy_to_the_first_work_that_reads_it() -> None:
    first, again = "Run F[0:2]@0:4 (W[0:2] X0@0:4) ->", "Run F[0:2]@4:8 (W[0:2] X0@4:8) ->"
    backward = "Run B[0:2]@0:4 (W[0:2] dX2@0:4) ->"
    spans = [
        Span("gpu0.h2d", "SwapIn W[0:2]", "weights", 0.0, 1.0, 8, 0),
        Span("gpu0.compute", first, "forward", 1.0, 2.0, 0, 1),
        Span("gpu0.compute", again, "forward", 2.0, 3.0, 0, 2),
        Span("gpu0.h2d", "SwapIn W[0:2]", "weights", 3.0, 4.0, 8, 3),
        Span("gpu0.h2d", "SwapIn W[4:6]", "weights", 4.0, 5.0, 8, 4),
        Span(
            "gpu0.compute",
            backward,
            "backward",
            5.0,
            6.0,
            0,
            5,
        ),
    ]
    events = trace_events({"predicted": Timeline(spans, 6.0)})["traceEvents"]
    arrows = [(e["ph"], e["id"], e["name"], e["ts"]) for e in events if e["ph"] in "sf"]
    assert arrows == [
        ("s", "1.2.0", "W[0:2]", 0.0), ("f", "1.2.0", "W[0:2]", 1e6),
        ("s", "1.2.3", "W[0:2]", 3e6), ("f", "1.2.3", "W[0:2]", 5e6),
    ]  # fmt: skip


def test_a_counter_shows_the_memory_of_each_device() -> None:
    graph = chain(6, weight=MIB, per_sample=MIB)
    costs, machine = uniform_costs(graph), server(2, memory=24 * MIB)
    plan = choose(graph, costs, machine, 8)
    timeline = simulate(plan.schedule, graph, costs, machine)
    memory = memory_of(plan, graph, costs)
    events = trace_events({"predicted": timeline}, {"predicted": memory})["traceEvents"]
    for gpu, peak in enumerate(plan.peak_nbytes):
        counted = [e["args"]["MiB"] for e in events if e["name"] == f"gpu{gpu} memory"]
        assert max(counted) * MIB == peak
    arrows = [e for e in events if e["ph"] == "s"]
    copies = [span for span in timeline.spans if span.lane.endswith(".h2d")]
    assert len(arrows) == len(copies), "every copy serves somebody"
