from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.config.units import Every, parse_count, parse_every, parse_fraction, parse_seconds


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4k", 4000),
        ("4 k", 4000),
        ("4Ki", 4096),
        ("1.5M", 1_500_000),
        ("1_000", 1000),
        (1e6, 10**6),
        ("1e6", 10**6),
        ("2B", 2 * 10**9),
        ("15T", 15 * 10**12),
        ("0.5k", 500),
    ],
)
def test_counts(written: object, count: int) -> None:
    assert parse_count(written) == count


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1.5", "should be a whole number, but is 1.5"),
        (1_000_000.5, "should be a whole number, but is 1000000.5"),
        ("4.5.6k", "should be a quantity such as"),
        ("-5", "should be a quantity such as"),
        (True, "should be a quantity such as"),
        (None, "should be a quantity such as"),
        (float("inf"), "should be a quantity such as"),
        (float("nan"), "should be a quantity such as"),
        ("4x", "unknown unit 'x': use k, M, B, T or Ki, Mi, Gi"),
        ("1e999", "should be at most 1e\\+18"),
        ("9e17k", "should be at most 1e\\+18"),
        ("1e99999", "should be a quantity such as"),
    ],
)
def test_counts_that_are_none(written: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_count(written)


@given(st.integers(min_value=0, max_value=10**15))
def test_counts_are_exact(count: int) -> None:
    assert parse_count(count) == count
    assert parse_count(str(count)) == count
    assert parse_count(f"{count // 1000}.{count % 1000:03}k") == count


def test_seconds_and_fractions() -> None:
    assert [parse_seconds(text) for text in ("90", "500ms", "2m", "1.5h", "1d")] == [
        90,
        0.5,
        120,
        5400,
        86400,
    ]
    assert [parse_fraction(text) for text in ("2%", 0.02, "100%", 0, "0.1%")] == [0.02, 0.02, 1, 0, 0.001]
    with pytest.raises(ValueError, match="between 0% and 100%, but is 200%"):
        parse_fraction(2)


@pytest.mark.parametrize("written", ["100 steps", "1 step", "2m", "0.5s", "123456.789s", "1e-5s"])
def test_intervals_read_back_equal(written: str) -> None:
    every = parse_every(written)
    assert parse_every(str(every)) == every
    assert parse_every(every) is every


def test_intervals() -> None:
    assert parse_every("100steps") == Every(steps=100)
    for written, said in (
        (3, "say its unit"),
        ("0s", "more than 0"),
        ("1.5 steps", "whole number"),
        ("2x", "use ms"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_every(written)
