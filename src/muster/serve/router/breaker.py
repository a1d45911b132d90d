"""Whether to trust a replica: opens after failures in a row, and tries again with one request at a time.

State machines over plain data and a clock that is passed in, so that tests simulate them (circuit breaker, Nygard
2007).
"""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = 3
"""In a row, after which a replica gets no more requests for a while:"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""at first, and after each trial that fails twice as long, up to this."""
RETRY_SHARE, RETRY_RESERVE = 0.2, 20.0
"""Retries of answers that were failures, in proportion to all requests, and how many may come at once: when all
replicas fail, retries must not multiply the load."""


@dataclass(slots=True)
class Breaker:
    """One replica's."""

    failures: int = 0
    pause_s: float = FIRST_PAUSE_S
    until_s: float = 0.0
    trying: bool = False

    @property
    def is_open(self) -> bool:
        return self.failures >= FAILURES

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent."""
        return not self.is_open or (now_s >= self.until_s and not self.trying)

    def began(self) -> None:
        """A request is being sent; while open, it is the trial."""
        self.trying = self.is_open

    def succeeded(self) -> None:
        self.failures, self.pause_s, self.trying = 0, FIRST_PAUSE_S, False

    def failed(self, now_s: float) -> None:
        self.failures += 1
        if self.failures == FAILURES or self.trying:
            self.until_s = now_s + self.pause_s
            self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        self.trying = False

    def abandoned(self) -> None:
        """The client left before the request showed anything."""
        self.trying = False


@dataclass(slots=True)
class RetryBudget:
    """How many retries all requests together have left."""

    left: float = RETRY_RESERVE

    def arrived(self) -> None:
        self.left = min(self.left + RETRY_SHARE, RETRY_RESERVE)

    def take(self) -> bool:
        """Whether there is a retry left; it is spent."""
        if self.left < 1:
            return False
        self.left -= 1
        return True
