"""Clients that send byte by byte, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import os
import random
import resource
import selectors
import socket
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
    """Phases with the crowd and without, in turn, so that what else the machine does is in both."""
    crowd, rounds, phase_s = (100, 1, 3.0) if short else (1000, 5, 11.0)
    latency_s: dict[bool, list[float]] = {True: [], False: []}
    ended, late = list[float](), list[float]()
    with serving(folder, "--streams", "8") as server:
        asyncio.run(_good(server.url, 2.0))
        for _ in range(rounds):
            latency_s[False] += asyncio.run(_good(server.url, phase_s))
            # In a process of its own: what the rude ones cost their own client is not what they cost others.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                slow = pool.submit(_slow_crowd, server.port, crowd, phase_s + 2)
                time.sleep(2)  # they are there
                latency_s[True] += asyncio.run(_good(server.url, phase_s))
                borne_s, late_s = slow.result()
                ended, late = ended + borne_s, late + late_s
    alone, beside = percentiles(latency_s[False]), percentiles(latency_s[True])
    return {
        "connections": crowd,
        "alone_latency_s": alone,
        "beside_latency_s": beside,
        "p99_ratio": beside["p99"] / alone["p99"],
        "bar": SLOWLORIS_BAR,
        "closed": len(ended),
        "closed_after_s": percentiles(ended),
        "deadline_s": 10.0,
        "sent": len(late),
        "sent_late_s": percentiles(late),
    }


async def _good(url: str, seconds: float) -> list[float]:
    """Latencies of four clients that ask one request after the other."""
    client = Server(url)
    model, until_s = await client.model(), time.perf_counter() + seconds
    found: list[float] = []

    async def one(seed: int) -> None:
        while time.perf_counter() < until_s:
            load = list(requests(Workload(requests=10, prompt_tokens=32, output_tokens=32, seed=seed)))
            outcomes = await closed_loop(client, model, load, concurrency=1, tell=ignore)
            assert all(outcome.succeeded for outcome in outcomes)
            found.extend(outcome.ended_s - outcome.due_s for outcome in outcomes)

    await asyncio.gather(*(one(seed) for seed in range(4)))
    return found


def _slow_crowd(port: int, size: int, seconds: float) -> tuple[list[float], list[float]]:
    """So many connections for so long, each of which comes again when it is closed: how long each was borne, and how
    late each piece was sent.

    Each sends a header that never ends, a byte a second. It has the server's cores only when nobody else wants them: in
    life the rude ones have their own.
    """
    os.nice(19)
    began: dict[socket.socket, float] = {}
    ended, late = list[float](), list[float]()
    due: list[tuple[float, int, socket.socket, bytes]] = []
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with selectors.DefaultSelector() as selector:

        def come() -> None:
            sock = socket.create_connection(("127.0.0.1", port))
            selector.register(sock, selectors.EVENT_READ)
            began[sock] = time.perf_counter()
            heapq.heappush(due, (began[sock], id(sock), sock, b"GET /health HTTP/1.1\r\nHost: x\r\n"))

        for _ in range(size):
            come()
        until_s = time.perf_counter() + seconds
        while (now_s := time.perf_counter()) < until_s:
            while due[0][0] <= now_s:
                due_s, number, sock, data = heapq.heappop(due)
                if sock in began:
                    with contextlib.suppress(ConnectionError):
                        sock.send(data)
                    late.append(time.perf_counter() - due_s)
                    heapq.heappush(due, (due_s + 1.0, number, sock, b"X"))
            for key, _ in selector.select(due[0][0] - now_s):
                sock = key.fileobj  # type: ignore[assignment]
                with contextlib.suppress(ConnectionError):
                    if sock.recv(1 << 12):
                        continue
                ended.append(time.perf_counter() - began.pop(sock))
                selector.unregister(sock)
                sock.close()
                come()
    for sock in began:
        sock.close()
    return ended, late


def measure_disconnects(folder: Path, short: bool) -> dict[str, Any]:
    """Some 800 clients a second, which is less than the server can greet: what it has still to free when the last one
    has left is counted, and not who waits to be let in."""
    count, at_once = (300, 32) if short else (10_000, 40)
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
