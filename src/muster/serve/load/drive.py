"""Sends a workload: at the times of a Poisson process whatever the server does, or so many requests at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from muster.serve.load.client import Outcome, Server
from muster.serve.load.workload import Sent, arrivals_s


async def open_loop(
    server: Server,
    model: str,
    sent: Sequence[Sent],
    *,
    rate: float,
    seed: int,
    tell: Callable[[Outcome], None],
) -> list[Outcome]:
    """Requests arrive `rate` times a second; a server that is too slow gets more and more of them at a time."""
    start = time.perf_counter()

    async def one(request: Sent, after_s: float) -> Outcome:
        await asyncio.sleep(start + after_s - time.perf_counter())
        outcome = await server.complete(request, model, start + after_s)
        tell(outcome)
        return outcome

    times = arrivals_s(len(sent), rate, seed)
    return await asyncio.gather(*(one(request, at) for request, at in zip(sent, times, strict=True)))


async def closed_loop(
    server: Server, model: str, sent: Sequence[Sent], *, concurrency: int, tell: Callable[[Outcome], None]
) -> list[Outcome]:
    """`concurrency` clients, each of which sends its next request when it has the answer to the last."""
    outcomes: list[Outcome] = []
    waiting = iter(sent)

    async def client() -> None:
        for request in waiting:
            outcome = await server.complete(request, model, time.perf_counter())
            outcomes.append(outcome)
            tell(outcome)

    await asyncio.gather(*(client() for _ in range(min(concurrency, len(sent)))))
    return sorted(outcomes, key=lambda outcome: outcome.number)
