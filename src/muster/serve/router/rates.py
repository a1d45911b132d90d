"""How fast a replica is, from what it delivered: a weight for unequal ones."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_S = 2.0
"""Busy time over which a rate is taken."""
KEPT = 0.97
"""Of the highest rate, what the next window leaves of it."""
LEAST_SHARE = 0.1
"""Of the fastest replica's rate, what a slow one counts at least: it must stay measurable."""


@dataclass(slots=True)
class Meter:
    """Tokens a second of one replica while it is busy; the clock is passed in.

    The highest of late counts: a replica with few requests at a time delivers less than it could, and would get
    fewer and fewer if that were its weight.
    """

    rate: float | None = None
    running: int = 0
    tokens: float = 0.0
    busy_s: float = 0.0
    since_s: float = 0.0

    def began(self, now_s: float) -> None:
        self._advance(now_s)
        self.running += 1

    def ended(self, now_s: float) -> None:
        self._advance(now_s)
        self.running -= 1

    def delivered(self, tokens: float, now_s: float) -> None:
        self.tokens += tokens
        self._advance(now_s)

    def _advance(self, now_s: float) -> None:
        if self.running:
            self.busy_s += now_s - self.since_s
        self.since_s = now_s
        if self.busy_s >= WINDOW_S:
            rate = self.tokens / self.busy_s
            self.rate = rate if self.rate is None else max(rate, KEPT * self.rate)
            self.tokens = self.busy_s = 0.0


def weights(rates: list[float | None]) -> list[float]:
    """Rates as weights, the fastest 1; who is not measured yet counts as the fastest."""
    fastest = max((rate for rate in rates if rate), default=1.0)
    return [1.0 if rate is None else max(rate / fastest, LEAST_SHARE) for rate in rates]
