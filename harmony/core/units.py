"""Bytes, rates, seconds and lists of names as text; how tensors are aligned."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harmony.errors import ConfigError

ALIGN_NBYTES = 64
"""Each tensor in an arena or a slot starts at a multiple of this: on memory aligned less, CPU
kernels may take another path, with other last bits."""

MOST_NBYTES = 2**62
"""More than any memory has, and it fits 64 bits."""

_SUFFIXES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*")


def aligned(nbytes: int) -> int:
    """Round bytes up to ``ALIGN_NBYTES``."""
    return -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES


def listed(names: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """Write out the first names, and say how many there are besides."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes that ``text`` names: ``"64MiB"``, ``"1.5GB"``, ``"8G"`` or 4096.

    A bare ``K``, ``M``, ``G`` or ``T`` is binary, as in most tools that report memory.

    Raises:
        ConfigError: if it is not a positive number with a known unit.
    """
    value = text if isinstance(text, int) and not isinstance(text, bool) else _size(text)
    if value <= 0:
        raise ConfigError(f"a size must be positive, not {text!r}")
    if value > MOST_NBYTES:
        raise ConfigError(f"no memory has {str(text)[:40]} bytes")
    return int(value)


def parse_bytes_with_unit(text: str | int) -> int:
    """Return the bytes that ``text`` names, as `parse_bytes`; text of digits alone is refused.

    Raises:
        ConfigError: if it is no size, or does not say of what.
    """
    if isinstance(text, str) and text.isdecimal() and text.strip("0"):
        raise ConfigError(f"{text}: in which unit? Write it like {text[:20]}GiB")
    return parse_bytes(text)


def _size(text: object) -> float:
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if isinstance(text, str) and text.startswith("-") and _NUMBER.fullmatch(text[1:]):
        raise ConfigError(f"a size must be positive, not {text[:40]!r}. Write it like 64MiB")
    if match is None or match[2].lower() not in _SUFFIXES:
        raise ConfigError(f"not a size: {str(text)[:40]!r}. Write it like 64MiB, 1.5GB or 8G")
    value = float(match[1]) * _SUFFIXES[match[2].lower()]
    return int(value) if value < MOST_NBYTES else value


def parse_rate(text: str | float) -> float:
    """Return bytes per second: ``"8GB/s"``, ``"500MiB/s"``, or a number.

    Raises:
        ConfigError: if it is not a positive size per second.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not 0 < text < MOST_NBYTES:
            raise ConfigError(f"a rate must be positive and finite, not {str(text)[:40]}")
        return float(text)
    if not isinstance(text, str) or not text.endswith("/s"):
        raise ConfigError(f"not a rate: {str(text)[:40]!r}. Write it like 8GB/s")
    return float(parse_bytes(text[: -len("/s")]))


_PERIODS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PERIOD = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]+)?)\s*(s|m|min|h)\s*")


def parse_period(text: str) -> float:
    """Return seconds: ``"30s"``, ``"15m"``, ``"1.5h"``.

    Raises:
        ConfigError: if it is not a positive number with a known unit.
    """
    match = _PERIOD.fullmatch(text) if isinstance(text, str) else None
    seconds = float(match[1]) * _PERIODS_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise ConfigError(f"not a time: {str(text)[:40]!r}. Write it like 30s, 15m or 2h")
    return seconds


def format_bytes(nbytes: float) -> str:
    """Print bytes with a binary unit and three digits: ``"12.5 MiB"``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} TiB"


def format_rate(bytes_per_s: float) -> str:
    """Print a rate with a decimal unit, as links are sold: ``"8.0 GB/s"``."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_s >= size:
            return f"{_three_digits(bytes_per_s / size)} {unit}"
    return f"{bytes_per_s:.0f} B/s"


def format_seconds(seconds: float) -> str:
    """Print a duration with a fitting unit: ``"12.3 ms"``."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size:
            return f"{_three_digits(seconds / size)} {unit}"
    return "0 s" if seconds == 0 else f"{seconds * 1e9:.0f} ns"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}"
