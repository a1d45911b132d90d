from __future__ import annotations

import math

import pytest

from muster.observe.format import count, duration, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.4, "999"),
        (999.6, "1k"),
        (1234, "1.23k"),
        (18_349, "18.3k"),
        (999_999, "1M"),
        (4_100_000, "4.1M"),
        (7e9, "7B"),
        (1.5e13, "15T"),
        (5e15, "5000T"),
        (math.inf, "?"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_size() -> None:
    assert [size(value) for value in (0, 512, 1_500_000, 999_999_999, 2e12)] == [
        "0 B",
        "512 B",
        "1.5 MB",
        "1 GB",
        "2 TB",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.7, "1m00s"), (75, "1m15s"), (9000, "2h30m"), (200_000, "2d07h"), (math.nan, "?")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
