"""Clients that send byte by byte, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from serve_front_server import body, ignore, percentiles, post, read_all, serving

from muster.serve.load.client import Server
from muster.serve.load.drive import closed_loop
from muster.serve.load.workload import Workload, requests

SLOWLORIS_BAR, FREED_BAR_S = 1.1, 1.0


def measure_slowloris(folder: Path, short: bool) -> dict[str, Any]:
    crowd, count = (100, 60) if short else (1000, 1500)
    with serving(folder, "--streams", "8") as server:
        client = Server(server.url)

        async def good(seed: int) -> dict[str, float]:
            load = list(requests(Workload(requests=count, prompt_tokens=32, output_tokens=32, seed=seed)))
            outcomes = await closed_loop(client, await client.model(), load, concurrency=4, tell=ignore)
            assert all(one.succeeded for one in outcomes)
            return percentiles([one.ended_s - one.due_s for one in outcomes])

        asyncio.run(good(0))
        alone = asyncio.run(good(1))
        # In a process of its own: what the rude ones cost their own client is not what they cost others.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            slow = pool.submit(_slow_crowd, server.port, crowd, 14.0)
            time.sleep(3)  # they are there
            beside = asyncio.run(good(2))
            ended = slow.result()
    return {
        "connections": crowd,
        "alone_latency_s": alone,
        "beside_latency_s": beside,
        "p99_ratio": beside["p99"] / alone["p99"],
        "bar": SLOWLORIS_BAR,
        "closed": len(ended),
        "closed_after_s": percentiles(ended),
        "deadline_s": 10.0,
    }


def _slow_crowd(port: int, size: int, seconds: float) -> list[float]:
    """So many connections for so long, each of which comes again when it is closed; how long each was borne."""
    ended: list[float] = []

    async def slow() -> None:
        """A header that never ends, a byte a second."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            while not await _ends_within(reader, 1.0):
                writer.write(b"X")
        ended.append(time.perf_counter() - began)
        writer.close()

    async def again() -> None:
        while True:
            await slow()

    async def crowd() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(again() for _ in range(size)))

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(crowd())
    return ended


async def _ends_within(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return not await reader.read()
    except TimeoutError:
        return False


def measure_disconnects(folder: Path, short: bool) -> dict[str, Any]:
    count, at_once = (300, 32) if short else (10_000, 64)
    chance = random.Random(0)
    with serving(folder, "--streams", "8") as server:

        async def rude(room: asyncio.Semaphore) -> None:
            async with room:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                data = post(body(stream=chance.random() < 0.5, n=chance.choice((1, 1, 4)), max_tokens=1900))
                part = data if chance.random() < 0.8 else data[: chance.randrange(len(data))]
                with contextlib.suppress(ConnectionError):
                    writer.write(part)
                    await asyncio.sleep(chance.expovariate(20))
                if chance.random() < 0.5:
                    writer.transport.abort()
                writer.close()

        async def all_of_them() -> None:
            room = asyncio.Semaphore(at_once)
            await asyncio.gather(*(rude(room) for _ in range(count)))

        began = time.perf_counter()
        asyncio.run(all_of_them())
        seconds = time.perf_counter() - began
        freed_s = server.freed_s()
        read = read_all(server.port, [body(stream=True)])
    return {
        "disconnects": count,
        "seconds": seconds,
        "freed_s": freed_s,
        "bar_s": FREED_BAR_S,
        "answers_after": read,
    }
