"""Mixed traffic for a while, and whether memory grows."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
from serve_front_server import serving

from muster.serve.load.client import Server
from muster.serve.load.workload import Workload, requests


def measure_soak(folder: Path, short: bool) -> dict[str, Any]:
    seconds = 10 if short else 600
    rows: list[tuple[float, float, float]] = []
    with serving(folder, "--streams", "8") as server:
        client = Server(server.url)

        async def traffic() -> int:
            model, until = await client.model(), time.perf_counter() + seconds
            answered = 0

            async def one(seed: int) -> None:
                nonlocal answered
                while time.perf_counter() < until:
                    seed += 1000
                    load = requests(
                        Workload(requests=1, prompt_tokens=100, output_tokens=60, spread=0.9, seed=seed)
                    )
                    outcome = await client.complete(next(load), model, time.perf_counter())
                    answered += outcome.succeeded

            async def watch() -> None:
                while time.perf_counter() < until:
                    rows.append((time.perf_counter(), *server.rss_mb()))
                    await asyncio.sleep(seconds / 200)

            await asyncio.gather(watch(), *(one(seed) for seed in range(12)))
            return answered

        answered = asyncio.run(traffic())
    late = np.array(rows[len(rows) // 2 :])  # caches fill in the first half
    slope = np.polyfit(late[:, 0], late[:, 1:], 1)[0] * 60
    return {
        "seconds": seconds,
        "answers": answered,
        "http_mb": late[-1, 1],
        "engine_mb": late[-1, 2],
        "http_mb_per_minute": slope[0],
        "engine_mb_per_minute": slope[1],
    }
