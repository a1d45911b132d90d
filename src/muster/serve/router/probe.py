"""Asks each replica again and again whether it is ready, whatever kind of server it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import orjson

from muster.serve.router.fleet import Fleet, Replica
from muster.serve.router.upstream import Gone, Headers, Upstream

PROBE_S, ANSWER_S = 1.0, 5.0
"""Between probes, and how long an answer may take."""
FAILURES = 3
"""Probes without an answer after which a replica is dead, and its requests go on elsewhere."""
PATHS = ("/health/ready", "/health", "/v1/models")
"""The first that the server knows decides."""


async def watch(fleet: Fleet, replica: Replica, on_dead: Callable[[], None] = lambda: None) -> None:
    """Keep `replica.ready` up to date, for ever. `on_dead`: it is there, but has stopped answering."""
    failures, known = 0, 0
    while True:
        upstream = replica.upstream
        if upstream is not None:
            try:
                known, ready = await _is_ready(upstream, known)
                if ready and replica.relays is None:
                    replica.relays, replica.models = await _relays(upstream), await _models(upstream)
                failures = 0
                if ready != replica.ready and upstream is replica.upstream:
                    replica.ready = ready
                    fleet.changed()
            except (Gone, TimeoutError):
                failures += 1
                if failures == 1 and not replica.breaker.is_open:
                    replica.poked.set()  # soon again, to be sure
                if failures == FAILURES:
                    fleet.lost(replica)
                    on_dead()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_S):
                await replica.poked.wait()
        replica.poked.clear()


async def _is_ready(upstream: Upstream, known: int) -> tuple[int, bool]:
    """(place of the path that the server knows, its answer)."""
    for place in range(known, len(PATHS)):
        status, _ = await _get(upstream, PATHS[place])
        if status not in (404, 405, 501):
            return place, status < 400 or status in (401, 403)  # it answers, though not to us
    return 0, False


async def _relays(upstream: Upstream) -> bool:
    return (await _said(upstream, "/health")).get("relay") is True


async def _models(upstream: Upstream) -> frozenset[str]:
    """Names under which it answers: those of its model and its adapters."""
    return frozenset(card["id"] for card in await cards(upstream))


async def cards(upstream: Upstream, headers: Headers = ()) -> list[dict[str, Any]]:
    """What it says that it serves; nothing where it does not say. Raises Gone and TimeoutError."""
    found = (await _said(upstream, "/v1/models", headers)).get("data")
    listed = found if isinstance(found, list) else []
    return [card for card in listed if isinstance(card, dict) and isinstance(card.get("id"), str)]


async def _said(upstream: Upstream, path: str, headers: Headers = ()) -> dict[str, Any]:
    """A JSON object; empty for anything else."""
    status, content = await _get(upstream, path, headers)
    try:
        said = orjson.loads(content)
    except ValueError:
        return {}
    return said if status == 200 and isinstance(said, dict) else {}


async def _get(upstream: Upstream, path: str, headers: Headers = ()) -> tuple[int, bytes]:
    async with asyncio.timeout(ANSWER_S):
        exchange = await upstream.send("GET", path, headers, b"")
        try:
            return exchange.status, await exchange.whole()
        finally:
            exchange.close()
