"""Many clients, slow ones and rude ones: connections end at their deadlines, and nothing is left of who has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import time
from typing import Any

import httpx
import pytest

from muster.serve.receipt import CROWD

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LONG: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 5000, "ignore_eos": True}


def posted(fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


async def slow(served: Any, closed: list[float]) -> None:
    """A header that never ends."""
    began = time.monotonic()  # before the server's clock: this loop may be busy once it is connected
    reader, writer = await asyncio.open_connection(*served.address)
    with contextlib.suppress(ConnectionError):
        writer.write(GET[:20])
        await reader.read()
    closed.append(time.monotonic() - began)
    writer.close()


@pytest.mark.parametrize("crowd", [60, 200, pytest.param(1000, marks=pytest.mark.long)])
def test_a_crowd_of_slow_headers_ends_at_its_deadlines(serving: Any, model: Any, crowd: int) -> None:
    with serving(model, header_s=1.0) as served:

        async def run() -> tuple[list[float], int]:
            closed: list[float] = []
            crowded = asyncio.gather(*(slow(served, closed) for _ in range(crowd)))
            async with httpx.AsyncClient(timeout=60) as client:
                answer = await client.post(f"{served.url}/v1/completions", json=LONG | {"max_tokens": 5})
            await asyncio.wait_for(crowded, 60)
            return closed, answer.status_code

        closed, status = asyncio.run(run())
        assert status == 200
        assert len(closed) == crowd
        assert min(closed) > (0.9 if crowd < CROWD else 0.45)
        early = sum(after < 0.9 for after in closed)
        assert early == 0 if crowd < CROWD else early > (crowd - CROWD) / 2


def test_a_new_connection_takes_the_place_of_one_that_asks_nothing(serving: Any, model: Any) -> None:
    with serving(model, connections=8, header_s=1000) as served:

        async def run() -> None:
            held = [await asyncio.open_connection(*served.address) for _ in range(8)]
            for _, writer in held[:4]:
                writer.write(GET[:20])
            async with httpx.AsyncClient(timeout=60) as client:
                assert (await client.get(f"{served.url}/health")).status_code == 200
            assert (await held[0][0].read()).startswith((b"HTTP/1.1 503", b""))  # the oldest
            held[7][1].write(GET)
            assert (await held[7][0].readline()).startswith(b"HTTP/1.1 200")
            for _, writer in held:
                writer.close()

        asyncio.run(run())


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.long)])
def test_clients_that_leave_at_any_moment_leave_nothing(serving: Any, make_model: Any, count: int) -> None:
    chance = random.Random(0)
    with serving(make_model(context=6000)) as served:

        async def rude(room: asyncio.Semaphore) -> None:
            async with room:
                _, writer = await asyncio.open_connection(*served.address)
                data = posted(LONG | {"stream": chance.random() < 0.5, "n": chance.choice((1, 3))})
                writer.write(data if chance.random() < 0.8 else data[: chance.randrange(len(data))])
                await asyncio.sleep(chance.expovariate(50))
                writer.transport.abort()

        async def run() -> None:
            room = asyncio.Semaphore(20)
            await asyncio.gather(*(rude(room) for _ in range(count)))

        asyncio.run(run())
        deadline = time.monotonic() + 30
        while True:
            stats = served.engine.stats()
            left = (stats.running, stats.waiting, stats.used_blocks, len(served.server.server_state.tasks))
            if not any(left):
                break
            assert time.monotonic() < deadline, left
            time.sleep(0.01)
        assert httpx.post(f"{served.url}/v1/completions", json=LONG | {"max_tokens": 5}).status_code == 200


def test_curl(served: Any) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--max-time", "60", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    fields = json.dumps(LONG | {"max_tokens": 5, "temperature": 0})
    url = f"{served.url}/v1/completions"
    whole = json.loads(curl("--json", fields, url))["choices"][0]["text"]
    streamed = curl("-N", "--json", json.dumps(json.loads(fields) | {"stream": True}), url)
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole
