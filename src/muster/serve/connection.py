"""What answers need of a client's connection, whoever gives them: events, and an end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.types import Receive

_Result = TypeVar("_Result")


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event with a JSON payload."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def while_connected(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """Wait for `work`, cancelled as soon as the client disconnects (raises ClientDisconnect)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
