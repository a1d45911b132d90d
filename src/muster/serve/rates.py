"""How much a client may ask for: token buckets that hold a minute's worth, for requests and for tokens.

Tokens are taken when they are known, a prompt's at the start and the answer's at the end, so a bucket may fall below
empty: who has used up more than his share waits until it is filled again. Plain data and a clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from muster.serve.failures import RequestError

Clock = Callable[[], float]


@dataclass(slots=True)
class Bucket:
    """Fills at `per_minute` a minute, up to that many."""

    per_minute: float
    filled_s: float
    """When `level` was right."""
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def wait_s(self, now_s: float) -> float:
        """Time until one can be taken; 0 for now."""
        self.level = min(self.per_minute, self.level + (now_s - self.filled_s) * self.per_minute / 60)
        self.filled_s = now_s
        return max(0.0, (1 - self.level) * 60 / self.per_minute)


class Rates:
    """The rates of all clients, each with buckets of its own. None: no limit."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._limits = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def ask(self, client: str) -> None:
        """Count a request; raises RequestError (429) for one too many, or when the tokens are used up."""
        for unit in self._limits:
            bucket = self._bucket(client, unit)
            wait_s = 0.0 if bucket is None else bucket.wait_s(self._clock())
            if wait_s > 0:
                retry_s = math.ceil(wait_s)
                raise RequestError(
                    429,
                    f"this key may use {self._limits[unit]} {unit} a minute and has used them; retry in {retry_s} s",
                    code="rate_limit_exceeded",
                    retry_after_s=retry_s,
                )
        self._take(client, "requests", 1)

    def use(self, client: str, tokens: int) -> None:
        """Count tokens."""
        self._take(client, "tokens", tokens)

    def _take(self, client: str, unit: str, amount: int) -> None:
        bucket = self._bucket(client, unit)
        if bucket is not None:
            bucket.wait_s(self._clock())
            bucket.level -= amount

    def _bucket(self, client: str, unit: str) -> Bucket | None:
        limit = self._limits[unit]
        if limit is None:
            return None
        return self._buckets.setdefault((client, unit), Bucket(limit, self._clock()))
