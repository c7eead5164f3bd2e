"""Timelines: what the report adds up."""

from __future__ import annotations

from harmony.core.timeline import Span, Timeline


def _timeline() -> Timeline:
    return Timeline(
        spans=[
            Span("gpu1.h2d", "SwapIn W[2:4]", "weights", 0.0, 1.0, nbytes=30),
            Span("gpu0.h2d", "SwapIn X0@0:4", "inputs", 1.0, 1.5, nbytes=5, index=1),
            Span("gpu0.h2d", "SwapIn W[0:2]", "weights", 0.0, 1.0, nbytes=10, index=0),
            Span("gpu0.compute", "Run F[0:2]@0:4", "forward", 1.0, 4.0),
        ],
        step_s=4.0,
    )


def test_a_span_lasts_from_start_to_end() -> None:
    assert Span("gpu0.compute", "Run", "forward", 1.0, 3.5).duration_s == 2.5


def test_lanes_are_named_once_and_sorted() -> None:
    assert _timeline().lanes() == ["gpu0.compute", "gpu0.h2d", "gpu1.h2d"]


def test_spans_of_a_lane_come_in_the_order_they_started() -> None:
    labels = [span.label for span in _timeline().on("gpu0.h2d")]
    assert labels == ["SwapIn W[0:2]", "SwapIn X0@0:4"]


def test_spans_that_start_together_keep_the_order_of_the_program() -> None:
    spans = [Span("a", f"i{i}", "weights", 0.0, 0.0, index=i) for i in (3, 1, 2)]
    assert [span.index for span in Timeline(spans).on("a")] == [1, 2, 3]


def test_busy_seconds_add_up_per_lane() -> None:
    timeline = _timeline()
    assert timeline.busy_s("gpu0.h2d") == 1.5
    assert timeline.busy_s("gpu7.h2d") == 0


def test_bytes_add_up_by_link_and_kind() -> None:
    timeline = _timeline()
    assert timeline.bytes_by() == {("h2d", "weights"): 40, ("h2d", "inputs"): 5}
    assert timeline.bytes_by(["gpu0.h2d"]) == {("h2d", "weights"): 10, ("h2d", "inputs"): 5}
    assert timeline.bytes_by(["gpu0.compute"]) == {}
