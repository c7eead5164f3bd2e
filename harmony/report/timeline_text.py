"""Draws a timeline as text: a line a stream, a column for each part of the step."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from harmony.core.timeline import Span, Timeline
from harmony.core.units import format_seconds

WIDTH = 100
COLUMNS = 76
"""Columns of the picture itself."""

LETTERS = {
    "forward": "F",
    "backward": "B",
    "update": "U",
    "accumulate": "A",
    "weights": "w",
    "gradients": "g",
    "stash": "s",
    "saved": "v",
    "activations": "a",
    "inputs": "i",
    "outputs": "o",
}
"""How a kind of work, or what a copy carries, looks in the picture."""

_MEANINGS = {
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "accumulate": "gradients added, norms",
    "weights": "weights",
    "gradients": "gradients",
    "stash": "inputs of a backward",
    "saved": "saved activations",
    "activations": "activations",
    "inputs": "inputs",
    "outputs": "outputs",
}

_LANES = ("compute", "h2d", "d2h", "p2p")


def picture(timeline: Timeline, columns: int = COLUMNS) -> list[str]:
    """Draw a timeline: a line a stream, a column for each part of the step.

    A column shows what its stream does most of that time; ``·`` if it works less than half of it.
    From one pack to the next, the letters of compute go from upper to lower case and back.
    """
    if not timeline.spans or timeline.step_s <= 0:
        return ["Nothing runs."]
    end = format_seconds(timeline.step_s)
    lines = [f"{'':<14}0{'─' * (columns - 1 - len(end) - 1)} {end}"]
    before = ""
    used: set[str] = set()
    for lane in _ordered(timeline.lanes()):
        owner, _, stream = lane.partition(".")
        cells, kinds = _cells(timeline.on(lane), timeline.step_s, columns)
        used |= kinds
        lines.append(f"{owner if owner != before else '':<6}{stream:<8}{cells}".rstrip())
        before = owner
    legend = ", ".join(f"{LETTERS[kind]} {_MEANINGS[kind]}" for kind in LETTERS if kind in used)
    legend += "; · less than half of the time; the case of F and B changes with the pack"
    return [*lines, *textwrap.wrap(legend, WIDTH)]


def _ordered(lanes: Sequence[str]) -> list[str]:
    """GPUs by number, their streams in one order, the host last."""

    def key(lane: str) -> tuple[int, int, str]:
        owner, _, stream = lane.partition(".")
        number = int(owner[3:]) if owner.startswith("gpu") else 1 << 30
        return number, _LANES.index(stream) if stream in _LANES else len(_LANES), lane

    return sorted(lanes, key=key)


def _cells(spans: Sequence[Span], step_s: float, columns: int) -> tuple[str, set[str]]:
    width = step_s / columns
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    looks = _alternating(spans)
    for span in spans:
        first = min(int(span.start_s / width), columns - 1)
        last = min(int(span.end_s / width), columns - 1)
        for column in range(first, last + 1):
            low, high = column * width, (column + 1) * width
            part = min(span.end_s, high) - max(span.start_s, low)
            if part > 0:
                look = looks.get(span.label, LETTERS.get(span.kind, "?"))
                shares[column][look] = shares[column].get(look, 0.0) + part
    text = ""
    for share in shares:
        most = max(share, key=lambda look: (share[look], look), default=" ")
        text += most if sum(share.values()) >= 0.5 * width or not share else "·"
    return text, {span.kind for span in spans}


def _alternating(spans: Sequence[Span]) -> dict[str, str]:
    """Letters of Runs by their label, in another case for every other pack."""
    looks: dict[str, str] = {}
    before, lower = "", True
    for span in spans:
        if span.kind not in ("forward", "backward"):
            continue
        pack = span.label.partition("@")[0]
        lower = lower if pack == before else not lower
        before = pack
        letter = LETTERS[span.kind]
        looks[span.label] = letter.lower() if lower else letter
    return looks
