"""A stream that is slow to begin is asked for a second time, elsewhere: the first token wins, and the other is cut off
(hedged requests, Dean & Barroso 2013). Either replica would say the same, as draws depend on seed and position alone.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from muster.config.units import parse_seconds
from muster.errors import UsageError
from muster.serve.router.upstream import Exchange, Gone

if TYPE_CHECKING:
    from muster.serve.router.fleet import Attempt

ENOUGH, KEPT = 50, 500
"""Streams of which a percentile says something, and how many of the last it is taken from."""


class Hedging:
    """After how long. Off where nothing is said; `500ms` is a time, `p95` what so many streams begin within."""

    def __init__(self, said: str | None = None) -> None:
        self._after_s: float | None = None
        self._percent = 0
        self._lately: deque[float] = deque(maxlen=KEPT)
        self.hedges = self.wins = 0
        """Requests asked for twice, and those of them that the second replica answered."""
        if said is None:
            return
        if found := re.fullmatch(r"p([1-9][0-9])", said):
            self._percent = int(found[1])
            return
        try:
            self._after_s = parse_seconds(said)
        except ValueError as error:
            raise UsageError(f"--hedge-after: {error}; or write p95 for a percentile") from None

    @property
    def on(self) -> bool:
        return self._percent > 0 or self._after_s is not None

    @property
    def after_s(self) -> float | None:
        """None: not at all, for now."""
        if self._percent == 0 or len(self._lately) < ENOUGH:
            return self._after_s
        ordered = sorted(self._lately)
        return ordered[len(ordered) * self._percent // 100]

    def began(self, took_s: float) -> None:
        """A stream has."""
        self._lately.append(took_s)


async def race(
    attempt: Attempt,
    opening: Callable[[Attempt], Awaitable[Exchange]],
    second: Callable[[], Attempt | None],
    hedging: Hedging,
    is_refused: Callable[[Exchange], bool],
) -> tuple[Attempt, Exchange]:
    """The attempt whose answer begins first; the other one is over. `second` begins that, where it may be. Raises Gone
    when the last one has died."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    racing = {asyncio.ensure_future(opening(attempt)): attempt}
    try:
        done, _ = await asyncio.wait(racing, timeout=hedging.after_s)
        if not done and (other := second()) is not None:
            hedging.hedges += 1
            racing[asyncio.ensure_future(opening(other))] = other
        while True:
            done, _ = await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                last, one = len(racing) == 1, racing.pop(task)
                try:
                    exchange = task.result()
                except Gone:
                    if last:
                        raise
                    one.failed()
                    one.ended()
                    continue
                if not last and is_refused(exchange):
                    exchange.close()
                    one.ended()
                    continue
                hedging.began(loop.time() - began_s)
                hedging.wins += one is not attempt
                return one, exchange
    finally:
        for task in racing:
            task.cancel()
        for lost in await asyncio.gather(*racing, return_exceptions=True):
            if isinstance(lost, Exchange):
                lost.close()
        for one in racing.values():
            one.ended()
