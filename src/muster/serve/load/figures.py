"""Percentiles and rates of a benchmark's answers, as plain figures, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from muster.serve.load.client import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What an answer must be like to count in goodput (DistServe, Zhong et al. 2024); None: anything."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def is_met(self, outcome: Outcome) -> bool:
        if not outcome.succeeded:
            return False
        slow_start = self.ttft_s is not None and outcome.ttft_s > self.ttft_s
        return not slow_start and not (self.tpot_s is not None and outcome.tpot_s > self.tpot_s)


def summarize(outcomes: Sequence[Outcome], objective: Objective) -> dict[str, Any]:
    """Figures of one run. Token counts are the servers' own, and only finished answers count in rates."""
    good = [outcome for outcome in outcomes if outcome.succeeded]
    begun = min(outcome.due_s for outcome in outcomes)
    wall_s = max(outcome.ended_s for outcome in outcomes) - begun
    met = [outcome for outcome in good if objective.is_met(outcome)]
    tokens = sum(outcome.output_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "succeeded": len(good),
        "refused": sum(outcome.is_refused for outcome in outcomes),
        "failed": sum(not outcome.succeeded and not outcome.is_refused for outcome in outcomes),
        "wall_s": wall_s,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / wall_s,
        "requests_per_s": len(good) / wall_s,
        "goodput_requests_per_s": len(met) / wall_s,
        "objective": asdict(objective),
        "ttft_s": _percentiles([outcome.ttft_s for outcome in good]),
        "tpot_s": _percentiles([outcome.tpot_s for outcome in good if outcome.output_tokens > 1]),
        "itl_s": _percentiles([gap for outcome in good for gap in outcome.gaps_s]),
        "latency_s": _percentiles([outcome.ended_s - outcome.due_s for outcome in good]),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error and not outcome.is_refused})[
            :5
        ],
    }


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The table that people read."""
    said = [
        f"{figures['succeeded']} of {figures['requests']} requests answered in {figures['wall_s']:.1f} s, "
        f"{figures['refused']} refused, {figures['failed']} failed",
        f"{figures['output_tokens_per_s']:.1f} output tokens/s, {figures['requests_per_s']:.2f} requests/s, "
        f"{figures['goodput_requests_per_s']:.2f} requests/s within the objective",
        f"{'':26}" + "".join(f"{f'p{percent}':>11}" for percent in PERCENTILES),
    ]
    names = {
        "ttft_s": "time to first token",
        "tpot_s": "time per output token",
        "itl_s": "between tokens",
        "latency_s": "whole answer",
    }
    for key, name in names.items():
        if found := figures[key]:
            cells = "".join(f"{found[f'p{percent}'] * 1e3:8.1f} ms" for percent in PERCENTILES)
            said.append(f"{name:26}{cells}")
    said += [f"error: {error}" for error in figures["errors"]]
    return said


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One curve in a frame that begins at 0."""

    title: str
    points: Sequence[tuple[float, float]]
    mark: float | None = None
    """Where something happened."""


def picture(outcomes: Sequence[Outcome]) -> str:
    """SVG: which share of the answers began, and went on, within which time."""
    good = [outcome for outcome in outcomes if outcome.succeeded]
    curves = {
        "time to first token, ms": [outcome.ttft_s for outcome in good],
        "time per output token, ms": [outcome.tpot_s for outcome in good if outcome.output_tokens > 1],
    }
    return drawn([Panel(title=title, points=_shares(values)) for title, values in curves.items() if values])


def drawn(panels: Sequence[Panel]) -> str:
    """SVG of some panels beside one another, each 260 x 160 in a frame of 340 x 240."""
    body = "\n".join(_panel(at, panel) for at, panel in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * 340} 240" '
        f'font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'
    )


def _shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """The cumulative distribution of values in seconds: (ms, share of them within that)."""
    ordered = sorted(values)
    return [(0.0, 0.0), *((value * 1e3, rank / len(ordered)) for rank, value in enumerate(ordered, 1))]


def _panel(at: int, panel: Panel) -> str:
    left, top, width, height = at * 340 + 50, 30, 260, 160
    most = max(x for x, _ in panel.points) or 1.0
    highest = max(y for _, y in panel.points) or 1.0
    points = " ".join(
        f"{left + width * x / most:.1f},{top + height * (1 - y / highest):.1f}" for x, y in panel.points
    )
    ticks = "".join(
        f'<text x="{left + width * share:.0f}" y="{top + height + 18}" text-anchor="middle">{most * share:.3g}</text>'
        for share in (0, 0.5, 1)
    )
    mark = ""
    if panel.mark is not None:
        x = left + width * panel.mark / most
        mark = f'<path d="M {x:.1f} {top} v {height}" stroke="#c22" stroke-dasharray="4 3"/>'
    return (
        f'<text x="{left}" y="20">{panel.title}</text>'
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        f'<text x="{left - 8}" y="{top + 8}" text-anchor="end">{highest:.3g}</text>'
        f'<text x="{left - 8}" y="{top + height}" text-anchor="end">0</text>{ticks}{mark}'
        f'<polyline points="{points}" fill="none" stroke="#0a6" stroke-width="2"/>'
    )


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Empty where there is nothing to tell of."""
    if not values:
        return {}
    found = np.percentile(np.asarray(values), PERCENTILES)
    return {f"p{percent}": float(value) for percent, value in zip(PERCENTILES, found, strict=True)}
