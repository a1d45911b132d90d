"""Long prompts beside running streams, with and without replicas for prompts (`serve_router_cpu.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from router_side import CONTEXT, core_of, figure, make_model, pin, serving, wait

LAYERS, WIDTH = 8, 512
"""Of a model whose prompts take longer than its single tokens: a step of a prompt is a gap for all that run beside."""
STREAMS, TOKENS = 4, 300
"""Streams that are measured, and tokens of each."""
LONG_TOKENS, EVERY_S = CONTEXT - 24, 1.5
SIDES = {
    "two for everything": ("--replicas", "2"),
    "one, and one for prompts": ("--replicas", "1", "--prefill-replicas", "1"),
}


def prefill(scratch: Path, rounds: int) -> dict[str, Any]:
    """Both sides run at once, so that they are measured by turns under the same load."""
    names = ("itl p50", "p99", "longest", "long ttft")
    print(f"{'ms':>26}" + "".join(f"{name:>11}" for name in names) + "   handed over")
    folder = make_model(scratch / "wider" / "model", LAYERS, WIDTH)
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(_two(folder, options)) for name, options in SIDES.items()}
        for url in urls.values():
            asyncio.run(_measured(url, seed=-1, tokens=20))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for turn in range(rounds):
            for name in list(SIDES)[:: 1 if turn % 2 else -1]:
                runs[name].append(asyncio.run(_measured(urls[name], seed=turn, tokens=TOKENS)))
        result: dict[str, Any] = {}
        for name, found in runs.items():
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            carried = figure(urls[name], "muster_router_handovers_total")
            result[name] = middle | {"runs": found, "handovers": carried}
            cells = "".join(f"{middle[key] * 1e3:11.1f}" for key in found[0])
            print(f"{name:>26}{cells}   {carried[0] if carried else 0:.0f}", flush=True)
    ours, base = (result[name]["itl_p99_s"] for name in reversed(SIDES))
    result["itl_p99_ratio"] = base / ours
    print(f"the 99th percentile of the gaps is {base / ours:.2f} times as long without")
    return result


@contextlib.contextmanager
def _two(folder: Path, options: tuple[str, ...]) -> Iterator[str]:
    with serving(folder, *options, "--port", "0") as (url, process):
        wait(lambda: sum(figure(url, "muster_router_replica_ready")) == 2)
        for number, replica in enumerate(psutil.Process(process.pid).children()):
            pin(replica, core_of(number))
        yield url


async def _measured(url: str, seed: int, tokens: int) -> dict[str, float]:
    """Streams of short prompts, and long prompts beside them until these have ended."""
    chance = random.Random(seed)
    gaps: list[float] = []
    firsts: list[float] = []
    async with httpx.AsyncClient(timeout=120) as client:

        async def stream(prompt: list[int], count: int) -> list[float]:
            body = {
                "model": "model",
                "prompt": prompt,
                "max_tokens": count,
                "ignore_eos": True,
                "stream": True,
            }
            times = [time.perf_counter()]
            async with client.stream("POST", f"{url}/v1/completions", json=body | {"seed": 1}) as answer:
                if answer.status_code != 200:
                    raise SystemExit(f"a request failed with status {answer.status_code}")
                async for piece in answer.aiter_raw():
                    if piece.startswith(b"data: {"):
                        times.append(time.perf_counter())
            return times

        async def short() -> None:
            times = await stream([chance.randrange(250) for _ in range(8)], tokens)
            gaps.extend(two - one for one, two in itertools.pairwise(times[2:]))

        async def long() -> None:
            times = await stream([chance.randrange(250) for _ in range(LONG_TOKENS)], 1)
            firsts.append(times[1] - times[0])

        running = [asyncio.create_task(short()) for _ in range(STREAMS)]
        arriving = []
        while not all(one.done() for one in running):
            arriving.append(asyncio.create_task(long()))
            await asyncio.wait(running, timeout=EVERY_S)
        await asyncio.gather(*running, *arriving)
    p50, p99 = np.percentile(gaps, (50, 99))
    return {
        "itl_p50_s": float(p50),
        "itl_p99_s": float(p99),
        "longest_gap_s": max(gaps),
        "long_ttft_s": statistics.median(firsts),
    }
