"""What the figures say: a table of the sides, and the project's bars beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

Row = dict[str, Any]
OURS, ENGINE = "ours", "engine"
RATES = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill"}
HTTP_SHARE, READY_S, ROOFLINE_SHARE = 0.9, 3.0, 0.5
PREFIX_UNCACHED, PREFIX_CACHED = 2.0, 1.1


def least_ratio(shape: str, concurrency: int) -> float:
    """What our rate should at least be, in those of the best peer."""
    if concurrency == 1:
        return 1.0
    return 1.5 if shape == "1b" else 1.2


def tell(row: Row) -> None:
    """One line while the benchmark runs."""
    rates = "  ".join(f"{name} {row[key]:7.1f}" for key, name in RATES.items() if key in row)
    if "requests_per_s" in row:
        rates = (
            f"{row['requests_per_s']:.2f} requests/s, prefix cache {'on' if row['prefix_cache'] else 'off'}"
        )
    print(
        f"round {row['round']}  {row['shape']:5}{row['format']:6}{row['side']:13}{row['concurrency']:3} at a time  "
        f"{rates}  ready {row['ready_s']:5.2f} s  {row['memory_bytes'] / 1e9:.2f} GB  load {row['load']:.1f}",
        flush=True,
    )


def rates(rows: Sequence[Row], bandwidth: float) -> list[Row]:
    """Prints the best of the rounds by side, and returns the bars."""
    sides, bars = _in_order(rows, "side"), []
    shapes, formats, loads = (_in_order(rows, key) for key in ("shape", "format", "concurrency"))
    for key, name in RATES.items():
        print(f"\n{name}, tokens/s (best of {1 + max(row['round'] for row in rows)} rounds)")
        print(
            f"{'shape':6}{'format':7}{'requests':>9}"
            + "".join(f"{side:>14}" for side in sides)
            + f"{'ratio':>9}"
        )
        for shape, format, load in product(shapes, formats, loads):
            found = best(rows, key, shape=shape, format=format, concurrency=load)
            peers = {side: rate for side, rate in found.items() if side not in (OURS, ENGINE)}
            cells = "".join(f"{found[side]:14.1f}" if side in found else f"{'-':>14}" for side in sides)
            ratio = ""
            if OURS in found and peers:
                first = max(peers, key=lambda side: peers[side])
                bars.append(bar(
                    f"{name} {shape} {format} {load} at a time, of {first}", found[OURS] / peers[first],
                    least_ratio(shape, load),
                ))  # fmt: skip
                ratio = f"{bars[-1]['value']:8.2f}x"
            print(f"{shape:6}{format:7}{load:9}{cells}{ratio:>9}")
    for shape, format in product(shapes, formats):
        bars += _own(rows, shape, format, loads, bandwidth)
    _print(bars)
    return bars


def _own(rows: Sequence[Row], shape: str, format: str, loads: Sequence[int], bandwidth: float) -> list[Row]:
    """Bars that are about ours alone."""
    bars = []
    for load in loads:
        found = best(rows, "decode_tokens_per_s", shape=shape, format=format, concurrency=load)
        if OURS in found and ENGINE in found:
            name = f"decode {shape} {format} {load} at a time, of our engine without HTTP"
            bars.append(bar(name, found[OURS] / found[ENGINE], HTTP_SHARE))
        if OURS in found and load == 1:
            step_bytes = next(
                row["step_bytes"] for row in _where(rows, side=OURS, shape=shape, format=format)
            )
            least = ROOFLINE_SHARE if (shape, format) == ("1b", "int8") else None
            share = found[OURS] * step_bytes / bandwidth
            bars.append(bar(f"share of memory bandwidth, {shape} {format} 1 at a time", share, least))
    ready = [row["ready_s"] for row in _where(rows, side=OURS, shape=shape, format=format)]
    if ready:
        most = READY_S if format != "bf16" else None
        bars.append(bar(f"ready after, {shape} {format} (s)", min(ready), most, at_most=True))
    return bars


def prefix(rows: Sequence[Row]) -> list[Row]:
    """Prints requests/s of prompts with a shared beginning, and returns the bars."""
    bars = []
    for shape, format in product(_in_order(rows, "shape"), _in_order(rows, "format")):
        found = {
            caching: best(rows, "requests_per_s", shape=shape, format=format, prefix_cache=caching)
            for caching in (True, False)
        }
        print(f"\n{shape} {format}, requests/s, with a prefix cache and without (best of the rounds)")
        for side in _in_order(rows, "side"):
            cells = (found[caching].get(side) for caching in (True, False))
            print(f"{side:14}" + "".join("         -" if cell is None else f"{cell:10.2f}" for cell in cells))
        for caching, least in ((True, PREFIX_CACHED), (False, PREFIX_UNCACHED)):
            peers = {side: rate for side, rate in found[caching].items() if side not in (OURS, ENGINE)}
            if peers and OURS in found[True]:
                first = max(peers, key=lambda side: peers[side])
                name = (
                    f"shared prefix {shape} {format}, of {first} {'with' if caching else 'without'} a cache"
                )
                bars.append(bar(name, found[True][OURS] / peers[first], least))
    _print(bars)
    return bars


def best(rows: Sequence[Row], key: str, **where: Any) -> dict[str, float]:
    """The largest of the rounds, by side."""
    found: dict[str, float] = {}
    for row in _where(rows, **where):
        found[row["side"]] = max(row[key], found.get(row["side"], 0.0))
    return found


def bar(name: str, value: float, bar: float | None, *, at_most: bool = False) -> Row:
    met = None if bar is None else (value <= bar if at_most else value >= bar)
    return {"name": name, "value": value, "bar": bar, "met": met}


def _print(bars: Sequence[Row]) -> None:
    print(f"\n{'measured':>9}{'bar':>7}")
    for row in bars:
        wanted, said = (
            ("", "") if row["bar"] is None else (f"{row['bar']:.2f}", "yes" if row["met"] else "NO")
        )
        print(f"{row['value']:9.2f}{wanted:>7}  {said:4}{row['name']}")
    print(
        f"{sum(row['met'] is True for row in bars)} of {sum(row['met'] is not None for row in bars)} bars are met"
    )


def _where(rows: Sequence[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def _in_order(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
