"""The models of replicas that do not all serve the same ones, as one list."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from muster.serve.router.fleet import Fleet
from muster.serve.router.probe import cards
from muster.serve.router.upstream import Gone, Headers, Upstream

PATH = "/v1/models"


async def catalogue(fleet: Fleet, headers: Headers) -> bytes | None:
    """The answer to GET /v1/models with a client's headers, of one replica for each set of models; None where one
    replica's own answer is as good."""
    unlike = {one.models: one.upstream for one in fleet.replicas if one.ready and one.upstream is not None}
    if len(unlike) < 2:
        return None
    lists = await asyncio.gather(*(_cards(upstream, headers) for upstream in unlike.values()))
    listed = {card["id"]: card for found in lists for card in found}
    return orjson.dumps({"object": "list", "data": list(listed.values())}) if listed else None


async def _cards(upstream: Upstream, headers: Headers) -> list[dict[str, Any]]:
    try:
        return await cards(upstream, headers)
    except (Gone, TimeoutError):
        return []
