"""What happened when: spans on the streams of a step, predicted or measured. Data only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """One instruction on one stream.

    Attributes:
        lane: the stream, ``"gpu0.compute"``, ``"gpu1.h2d"``, ``"host.update"``.
        label: text of the instruction, ``"Run F[0:2]@0:4"``.
        kind: ``forward``, ``backward``, ``update``, ``accumulate`` for work; for a transfer what
            it carries: ``weights``, ``gradients``, ``stash`` (values that a backward
            recomputes from), ``saved`` (activations that it needs not recompute),
            ``activations``, ``inputs``, ``outputs``.
        start_s, end_s: seconds since the step began.
        nbytes: bytes moved; 0 for work.
        index: position of the instruction in its program.
    """

    lane: str
    label: str
    kind: str
    start_s: float
    end_s: float
    nbytes: int = 0
    index: int = -1  # type: ignore[assignment]  # tuple.index, deliberately shadowed

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass
class Timeline:
    """All spans of one step.

    Attributes:
        step_s: seconds from the first instruction to the end of the last.
        peak_nbytes: per device, the largest number of bytes in use.
        host_nbytes: bytes of host memory that the step uses.
    """

    spans: list[Span] = field(default_factory=list)
    step_s: float = 0.0
    peak_nbytes: list[int] = field(default_factory=list)
    host_nbytes: int = 0

    def lanes(self) -> list[str]:
        """Names of the streams that did anything, sorted."""
        return sorted({span.lane for span in self.spans})

    def on(self, lane: str) -> list[Span]:
        """Spans of one stream in order of their start."""
        spans = [span for span in self.spans if span.lane == lane]
        return sorted(spans, key=lambda span: (span.start_s, span.index))

    def busy_s(self, lane: str) -> float:
        """Seconds that a stream worked (its spans never overlap: a stream is a queue)."""
        return sum(span.duration_s for span in self.spans if span.lane == lane)

    def bytes_by(self, lanes: Iterable[str] | None = None) -> dict[tuple[str, str], int]:
        """Bytes moved per (link, kind), e.g. ``("h2d", "weights")``, over all or some streams."""
        wanted = None if lanes is None else set(lanes)
        total: dict[tuple[str, str], int] = {}
        for span in self.spans:
            if span.nbytes and (wanted is None or span.lane in wanted):
                key = (span.lane.rsplit(".", 1)[-1], span.kind)
                total[key] = total.get(key, 0) + span.nbytes
        return total
