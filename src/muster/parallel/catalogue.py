"""Layouts worth checking on a world of ranks: each technique alone at every degree that fits, and their compositions.

Pure; the keys are those of `layout:` in a run file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from muster.parallel.schedules import SCHEDULES

AXES = ("replicate", "shard", "context", "tensor", "pipeline")

Degrees = dict[str, Any]


def world_of(layout: Degrees) -> int:
    """Ranks that a layout needs."""
    return math.prod(layout.get(axis, 1) for axis in AXES)


def catalogue(ranks: int, *, experts: int = 0) -> dict[str, Degrees]:
    """Layouts by name that need at least 2 and at most `ranks` ranks; whether they fit a model is not asked here."""
    found = dict(_all(experts))
    return {name: layout for name, layout in found.items() if 2 <= world_of(layout) <= ranks}


def _all(experts: int) -> Iterator[tuple[str, Degrees]]:
    for n in (2, 4):
        yield f"replicate {n}", {"replicate": n}
        for zero in (1, 2, 3):
            yield f"zero {zero} x {n}", {"shard": n, "zero": zero}
    yield "hybrid 2 x 2", {"replicate": 2, "shard": 2, "zero": 3}
    yield "zero 3 x 2, buckets", {"shard": 2, "zero": 3, "bucket": 3, "prefetch": 2}
    for n in (2, 4):
        yield f"tensor {n}", {"tensor": n}
        yield f"tensor {n}, no sequence", {"tensor": n, "sequence_parallel": False}
    for n in (2, 4):
        for schedule in SCHEDULES:
            yield f"{schedule} x {n}", {"pipeline": n, "schedule": schedule}
    for n in (2, 4):
        for kind in ("ulysses", "ring"):
            yield f"{kind} x {n}", {"context": n, "context_kind": kind}
    yield "recompute selective", {"shard": 2, "recompute": "selective"}
    yield "zbv x 2, selective", {"pipeline": 2, "schedule": "zbv", "recompute": "selective"}
    yield "recompute full", {"shard": 2, "zero": 3, "recompute": "full"}
    yield from _compositions()
    if experts:
        yield from _with_experts()


def _compositions() -> Iterator[tuple[str, Degrees]]:
    yield "zero 3 x tensor", {"shard": 2, "zero": 3, "tensor": 2}
    yield "tensor x pipeline", {"tensor": 2, "pipeline": 2}
    yield "tensor x pipeline x replicate", {"tensor": 2, "pipeline": 2, "replicate": 2}
    yield "tensor x pipeline x shard", {"tensor": 2, "pipeline": 2, "shard": 2, "schedule": "zbv"}
    yield "context x tensor", {"context": 2, "tensor": 2}
    yield "pipeline x context", {"pipeline": 2, "context": 2}
    yield "zero 3 x context", {"shard": 2, "zero": 3, "context": 2}
    yield "zero 3 x context x tensor", {"shard": 2, "zero": 3, "context": 2, "tensor": 2}


def _with_experts() -> Iterator[tuple[str, Degrees]]:
    for n in (2, 4):
        yield f"expert {n}", {"shard": n, "expert": n}
    for zero in (1, 2, 3):
        yield f"expert 2 x zero {zero}", {"shard": 4, "expert": 2, "zero": zero}
    yield "expert x tensor", {"shard": 2, "expert": 2, "tensor": 2}
    yield "expert x pipeline", {"shard": 2, "expert": 2, "pipeline": 2}
    yield "expert x context", {"context": 2, "shard": 2, "expert": 4}
    yield "expert x replicate", {"replicate": 2, "shard": 2, "expert": 2, "zero": 3}
