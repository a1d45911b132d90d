"""What the router adds to the time to first token, and its own CPU time (`serve_router_cpu.py`)."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import time
from typing import Any
from urllib.parse import urlsplit

from router_side import REPLICAS, STREAMS, load, percentiles, routing

from muster.serve.load.workload import Workload


def added_ttft(url: str, pairs: int) -> dict[str, Any]:
    """Part 1, for a short prompt and a long one, streams and whole answers."""
    names = ("direct p50", "routed p50", "added p50", "p10", "p90", "its CPU")
    print(f"\n{'request, ms':>20}" + "".join(f"{name:>12}" for name in names))
    result: dict[str, Any] = {}
    with routing([url], "prefix") as (through, router):
        for name, prompt, stream in (
            ("stream, 16 tokens", "x" * 16, True),
            ("stream, 512 tokens", list(range(256)) * 2, True),
            ("whole, 16 tokens", "x" * 16, False),
        ):
            body = {"model": "model", "prompt": prompt, "max_tokens": 4, "seed": 1, "stream": stream}
            sides = {"direct": connect(url), "routed": connect(through)}
            times: dict[str, list[float]] = {side: [] for side in sides}
            before = router.cpu_times()
            for pair in range(pairs + 20):
                order = ("direct", "routed") if pair % 2 else ("routed", "direct")
                for side in order:
                    took_s = first_byte_s(sides[side], body)
                    if pair >= 20:
                        times[side].append(took_s)
            after = router.cpu_times()
            cpu_s = (after.user + after.system - before.user - before.system) / (pairs + 20)
            for connection in sides.values():
                connection.close()
            added = [routed - direct for direct, routed in zip(times["direct"], times["routed"], strict=True)]
            result[name] = {side: percentiles(values) for side, values in times.items()}
            result[name] |= {"added": percentiles(added), "router_cpu_s": cpu_s, "pairs": pairs}
            result[name]["load"] = os.getloadavg()[0]
            medians = [statistics.median(values) for values in (times["direct"], times["routed"], added)]
            spread = [result[name]["added"][percent] for percent in ("p10", "p90")]
            cells = "".join(f"{seconds * 1e3:12.3f}" for seconds in (*medians, *spread, cpu_s))
            print(f"{name:>20}{cells}", flush=True)
    return result


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)


def first_byte_s(connection: http.client.HTTPConnection, body: dict[str, Any]) -> float:
    """Seconds from sending a request to the first of its answer's body."""
    content = json.dumps(body).encode()
    started_s = time.perf_counter()
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read1(1)
    took_s = time.perf_counter() - started_s
    answer.read()
    return took_s


def cost_of_tokens(urls: list[str], count: int) -> dict[str, Any]:
    """The router's CPU time for a token that it passes on, under load."""
    workload = Workload(requests=max(count // 10, 12), prompt_tokens=32, output_tokens=64, seed=1)
    with routing(urls, "prefix") as (url, process):
        before = process.cpu_times()
        figures = load(url, workload, concurrency=REPLICAS * STREAMS)
        after = process.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    tokens = figures["output_tokens"]
    print(
        f"\nrouter's CPU time: {cpu_s / tokens * 1e6:.0f} us a token, of {tokens} tokens in {figures['wall_s']:.1f} s"
    )
    return {"cpu_s_per_token": cpu_s / tokens, "load": figures}
