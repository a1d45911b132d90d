"""A kill -9 of one of three replicas under load (`serve_router_cpu.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from router_side import REPLICAS, STREAMS, figure, serving, wait

from muster.serve.load.figures import Panel, drawn

PLOT = Path(__file__).parent / "results" / "serve_router_failover.svg"


def failover(folder: Path, count: int) -> dict[str, Any]:
    """Part 2."""
    result: dict[str, Any] = {}
    with serving(folder, "--replicas", REPLICAS, "--port", "0") as (url, process):
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == REPLICAS)
        undisturbed, timeline = ask(url, count, lambda done: None)
        result["undisturbed"] = timeline
        killed: dict[str, float] = {}

        def disturb(done: int) -> None:
            if done >= count // 3 and not killed:
                victim = psutil.Process(process.pid).children()[0]
                killed["at_s"] = time.perf_counter()
                victim.kill()

        disturbed, timeline = ask(url, count, disturb)
        timeline["killed_at_s"] = killed["at_s"] - timeline.pop("began")
        undisturbed_began = result["undisturbed"].pop("began")
        assert undisturbed_began
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == REPLICAS)
        result["disturbed"] = timeline | {"all_replicas_again_s": time.perf_counter() - killed["at_s"]}
        result["failovers"] = figure(url, "muster_router_failovers_total")[0]
    result["requests"] = count
    result["failed"] = sum(answer is None for answer in disturbed)
    result["equal"] = sum(
        one is not None and one == two for one, two in zip(undisturbed, disturbed, strict=True)
    )
    PLOT.write_text(picture(result["disturbed"]))
    print(
        f"kill -9 of one of {REPLICAS} replicas: {result['failed']} of {count} requests failed, {result['equal']} "
        f"answers equal, {result['failovers']:.0f} went on elsewhere; longest wait between two tokens "
        f"{timeline['longest_gap_s']:.2f} s ({result['undisturbed']['longest_gap_s']:.2f} s undisturbed); "
        f"{REPLICAS} replicas again after {result['disturbed']['all_replicas_again_s']:.1f} s",
        flush=True,
    )
    return result


def ask(url: str, count: int, disturb: Callable[[int], None]) -> tuple[list[Any], dict[str, Any]]:
    """All answers (None: failed), and when their pieces came: counts by tenth of a second."""
    began = time.perf_counter()
    arrived: list[float] = []
    failed_s: list[float] = []
    longest = [0.0]

    async def one(client: httpx.AsyncClient, number: int) -> Any:
        body: dict[str, Any] = {
            "model": "model",
            "prompt": f"request {number}",
            "max_tokens": 48,
            "ignore_eos": True,
        }
        body |= {"temperature": 0} if number % 2 else {"seed": number, "top_p": 0.9}
        if number % 4 == 3:
            answer = await client.post(f"{url}/v1/completions", json=body)
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else None
        content, last_s = b"", time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as answer:
            async for piece in answer.aiter_raw():
                now_s = time.perf_counter()
                arrived.append(now_s - began)
                if content:
                    longest[0] = max(longest[0], now_s - last_s)
                content, last_s = content + piece, now_s
        events = [event.removeprefix(b"data: ") for event in content.strip().split(b"\n\n")]
        if answer.status_code != 200 or events[-1] != b"[DONE]":
            return None
        return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])

    async def run() -> list[Any]:
        answers: list[Any] = [None] * count
        waiting, done = iter(range(count)), [0]
        async with httpx.AsyncClient(timeout=120) as client:

            async def worker() -> None:
                for number in waiting:
                    with contextlib.suppress(httpx.HTTPError):
                        answers[number] = await one(client, number)
                    if answers[number] is None:
                        failed_s.append(time.perf_counter() - began)
                    done[0] += 1
                    disturb(done[0])

            await asyncio.gather(*(worker() for _ in range(REPLICAS * STREAMS)))
        return answers

    answers = asyncio.run(run())
    bins = [0] * (int(max(arrived, default=0.0) * 10) + 1)
    for at_s in arrived:
        bins[int(at_s * 10)] += 1
    said = {"began": began, "pieces_by_tenth_s": bins, "failed_at_s": failed_s, "longest_gap_s": longest[0]}
    return answers, said


def picture(timeline: dict[str, Any]) -> str:
    """SVG: tokens a second by half seconds, and failed requests until then; the mark is the kill."""
    bins = timeline["pieces_by_tenth_s"]
    halves = [sum(bins[first : first + 5]) for first in range(0, len(bins) - len(bins) % 5, 5)]
    killed_s = timeline["killed_at_s"]
    tokens = [(0.5 * place + 0.25, 2.0 * count) for place, count in enumerate(halves)]
    failed = [(at_s, float(sum(one <= at_s for one in timeline["failed_at_s"]))) for at_s, _ in tokens]
    return drawn(
        [
            Panel(title="streamed tokens/s over seconds; kill -9", points=tokens, mark=killed_s),
            Panel(title="failed requests until then", points=failed, mark=killed_s),
        ]
    )
