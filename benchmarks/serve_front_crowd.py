"""More requests than the server can answer: what is answered in time, how long it waits, and what the rest costs.

With the tiny model of the other parts, HTTP and the clients keep both cores busy at the server's peak, so that any
further request costs one that was answered. Here the engine is what is busy, as it is with models of use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_front_server import Running, ignore, percentiles, serving, tiny

from muster.serve.load.client import Outcome, Server
from muster.serve.load.drive import closed_loop, open_loop
from muster.serve.load.figures import Objective, summarize
from muster.serve.load.workload import Workload, requests

GOODPUT_BAR, SLO_TTFT_S, MAX_WAIT_S = 0.9, 2.0, 1.0
LOADS = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Of the peak: the highest goodput seen so far, of as many clients as keep the server busy or at a lower load."""
PICTURE = Path(__file__).parent / "results" / "serve_overload.svg"


def measure_overload(folder: Path, short: bool) -> dict[str, Any]:
    seconds = 3 if short else 30
    model = tiny(folder.parent / "busy" / folder.name, layers=8, width=512)
    with serving(model, "--streams", "8", "--max-wait", f"{MAX_WAIT_S:g}") as server:
        best = summarize(asyncio.run(_peak(server, 40 if short else 800)), Objective(ttft_s=SLO_TTFT_S))
        peak, rows = best["goodput_requests_per_s"], []
        for load in (5.0,) if short else LOADS:
            rows.append(_offer(server, load * peak, seconds))
            peak = max(peak, rows[-1]["goodput_requests_per_s"])
    for row in rows:
        row["offered_of_peak"] = row["offered_requests_per_s"] / peak
        row["goodput_of_peak"] = row["goodput_requests_per_s"] / peak
    if not short:
        PICTURE.write_text(picture(rows))
    return {
        "peak_requests_per_s": peak,
        "goodput_of_peak": rows[-1]["goodput_of_peak"],
        "bar": GOODPUT_BAR,
        "slo_ttft_s": SLO_TTFT_S,
        "loads": rows,
    }


def _sent(count: int, seed: int) -> list[Any]:
    return list(requests(Workload(requests=count, prompt_tokens=64, output_tokens=64, seed=seed)))


async def _peak(server: Running, count: int) -> list[Outcome]:
    client = Server(server.url)
    return await closed_loop(client, await client.model(), _sent(count, 0), concurrency=12, tell=ignore)


async def _crowd(server: Running, rate: float, seconds: float) -> list[Outcome]:
    client = Server(server.url)
    load = _sent(round(rate * seconds), 1)
    return await open_loop(client, await client.model(), load, rate=rate, seed=1, tell=ignore)


def _offer(server: Running, rate: float, seconds: float) -> dict[str, Any]:
    objective = Objective(ttft_s=SLO_TTFT_S)
    outcomes = asyncio.run(_crowd(server, rate, seconds))
    freed_s = server.freed_s()
    figures = summarize(outcomes, objective)
    # Of the time in which requests came: the queue's end belongs to no one.
    begun = min(one.due_s for one in outcomes)
    met = [one for one in outcomes if objective.is_met(one) and one.ended_s - begun <= seconds]
    return {
        "offered_requests_per_s": rate,
        "goodput_requests_per_s": len(met) / seconds,
        "admitted_ttft_s": figures["ttft_s"],
        "succeeded": figures["succeeded"],
        "refused": figures["refused"],
        "failed": figures["failed"],
        "errors": figures["errors"],
        "refusal_s": percentiles([one.ended_s - one.due_s for one in outcomes if one.is_refused]),
        "freed_s": freed_s,
    }


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: answers in time, and the time to the first token of those that were admitted, over the offered load."""
    loads = [row["offered_of_peak"] for row in rows]
    goodput = [row["goodput_of_peak"] for row in rows]
    ttft = [row["admitted_ttft_s"]["p99"] for row in rows]
    body = _panel(0, "answers in time, of the peak", loads, goodput, GOODPUT_BAR, 1.2)
    body += _panel(1, "p99 time to first token, s", loads, ttft, SLO_TTFT_S, 1.2 * max(*ttft, SLO_TTFT_S))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 260" font-family="sans-serif" '
        f'font-size="12">\n{body}</svg>\n'
    )


def _panel(
    at: int, title: str, loads: Sequence[float], values: Sequence[float], bar: float, most: float
) -> str:
    """A curve over the load, 260 x 160 in a frame of 340 x 260, and the bar as a broken line."""
    left, top, width, height = at * 340 + 50, 30, 260, 160
    furthest = max(loads)

    def x(load: float) -> float:
        return left + width * load / furthest

    def y(value: float) -> float:
        return top + height * (1 - value / most)

    points = " ".join(f"{x(load):.1f},{y(value):.1f}" for load, value in zip(loads, values, strict=True))
    dots = "".join(
        f'<circle cx="{x(load):.1f}" cy="{y(value):.1f}" r="3" fill="#0a6"/>'
        f'<text x="{x(load):.1f}" y="{y(value) - 7:.1f}" text-anchor="middle">{value:.2f}</text>'
        for load, value in zip(loads, values, strict=True)
    )
    ticks = "".join(
        f'<text x="{x(load):.0f}" y="{top + height + 18}" text-anchor="middle">{load:.1f}</text>'
        for load in loads
    )
    return (
        f'<text x="{left}" y="20">{title}</text>'
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        f'<text x="{left - 8}" y="{y(bar) + 4:.0f}" text-anchor="end">{bar:g}</text>'
        f'<line x1="{left}" x2="{left + width}" y1="{y(bar):.1f}" y2="{y(bar):.1f}" stroke="#c33" '
        f'stroke-dasharray="4"/>'
        f'<polyline points="{points}" fill="none" stroke="#0a6" stroke-width="2"/>{dots}{ticks}'
        f'<text x="{left + width / 2:.0f}" y="{top + height + 38}" text-anchor="middle">offered load, of the peak'
        f"</text>\n"
    )
