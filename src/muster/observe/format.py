"""Figures as people read them: three digits and a unit."""

from __future__ import annotations

import math


def count(value: float) -> str:
    """1234 -> '1.23k', 4_100_000 -> '4.1M'."""
    return _scaled(value, ("", "k", "M", "B", "T"))


def size(value: float) -> str:
    """Bytes: 1_500_000 -> '1.5 MB'."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def duration(seconds: float) -> str:
    """75 -> '1m15s', 9000 -> '2h30m'; '?' where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return "?"
    rest = list(units)
    while abs(value) >= 999.5 and len(rest) > 1:  # 999.5 would be written as 1e+03
        value /= 1000
        rest.pop(0)
    return f"{value:.3g}{rest[0]}" if abs(value) < 999.5 else f"{value:.0f}{rest[0]}"
