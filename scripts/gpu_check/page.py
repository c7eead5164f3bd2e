"""The page of text: what a person reads first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

WIDTH = 100


def as_text(found: dict[str, Any]) -> str:
    """Render everything that is known: a paragraph for each step."""
    head = f"Harmony on this machine, commit {found['commit'][:12]}"
    if found["small"]:
        head += " (a rehearsal with tiny models: no figure says anything of speed)"
    lines = [head, "=" * min(len(head), WIDTH), ""]
    for name, step in found["steps"].items():
        lines.append(f"{name}: {step['state']}, {step['seconds']:.0f} s")
        lines += [f"  {line}" for figure in step["figures"] for line in _figure(figure)]
        if step["error"]:
            lines += [f"  | {line[: WIDTH - 4]}" for line in step["error"].splitlines()]
        lines.append("")
    return "\n".join(lines)


def _figure(figure: dict[str, Any]) -> Iterator[str]:
    """Lines of one figure: its name, and what was found."""
    named = dict(figure)
    what = named.pop("what", "")
    parts = [f"{key} {_value(value)}" for key, value in named.items()]
    line = f"{what}: " if what else ""
    for number, part in enumerate(parts):
        joined = line + part + (", " if number < len(parts) - 1 else "")
        if len(joined) > WIDTH - 2 and line.strip():
            yield line.rstrip()
            joined = "    " + part + (", " if number < len(parts) - 1 else "")
        line = joined
    if line.strip():
        yield line.rstrip()


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(_value(item) for item in value)
    return str(value)
