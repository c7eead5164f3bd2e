"""Sizes, rates and durations as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmony.core.units import (
    format_bytes,
    format_rate,
    format_seconds,
    listed,
    parse_bytes,
    parse_period,
    parse_rate,
)
from harmony.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("64M", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("8G", 8 * 2**30),
        (".5k", 512),
        ("7", 7),
        ("7B", 7),
        (4096, 4096),
        ("2TiB", 2 * 2**40),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "64 parsecs", "-1GB", "1e9", "1,5GB", "64MiB/s"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="64MiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "0GiB", 0, -5, "0.1B"])
def test_a_size_must_be_positive(text: str | int) -> None:
    with pytest.raises(ConfigError, match="positive"):
        parse_bytes(text)


def test_rates_are_read() -> None:
    assert parse_rate("8GB/s") == 8e9
    assert parse_rate("500MiB/s") == 500 * 2**20
    assert parse_rate(2.5e9) == 2.5e9


@pytest.mark.parametrize("text", ["8GB", "fast", "8GB/h", "/s", 0, -1.0])
def test_what_is_no_rate_is_refused(text: str | float) -> None:
    with pytest.raises(ConfigError):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("15m", 900.0), ("15 min", 900.0), ("1.5h", 5400.0)]
)
def test_periods_are_read(text: str, seconds: float) -> None:
    assert parse_period(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "-1m", "0s", "3 days", "1e3s"])
def test_what_is_no_period_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="30s, 15m or 2h"):
        parse_period(text)


def test_numbers_are_printed_with_three_digits() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(64 * 2**20) == "64.0 MiB"
    assert format_bytes(3 * 2**40) == "3.00 TiB"
    assert format_rate(8e9) == "8.00 GB/s"
    assert format_rate(12) == "12 B/s"
    assert format_seconds(0) == "0 s"
    assert format_seconds(0.0123) == "12.3 ms"
    assert format_seconds(2.5e-9) == "2 ns"
    assert format_seconds(90) == "90.0 s"


@given(st.integers(min_value=1, max_value=2**50))
def test_a_printed_size_reads_back_within_its_three_digits(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= 0.0051 * nbytes


def test_of_a_long_list_of_names_the_first_are_written_out() -> None:
    assert listed(["a"], 1) == "a"
    assert listed(["a", "b", "c"], 1) == "a and 2 more"
    assert listed(["a", "b"], 2, "; ") == "a; b"
