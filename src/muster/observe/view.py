"""What a run folder says about its run, from its records alone; tolerant of folders that are none or half written."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muster.observe.records import read_jsonl

_QUIET_S = 600.0
"""A run without an end whose records are this old is taken to have been stopped."""


@dataclass(frozen=True, slots=True)
class RunView:
    name: str
    state: str
    """running, finished, failed or stopped."""
    step: int
    steps: int
    loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    bytes: int
    age_s: float


def view(folder: Path) -> RunView | None:
    """The run in `folder`; None where there is none."""
    try:
        steps = int(json.loads((folder / "run.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    events, metrics = read_jsonl(folder / "events.jsonl"), read_jsonl(folder / "metrics.jsonl")
    latest = max((record.get("time", 0.0) for record in events + metrics), default=0.0)
    age_s = time.time() - latest if latest else 0.0
    return RunView(
        name=folder.name,
        state=_state(events, age_s),
        step=_last(metrics, "step") or 0,
        steps=steps,
        loss=_last(metrics, "loss"),
        bits_per_byte=_last(metrics, "held_out_bits_per_byte"),
        tokens_per_s=_last(metrics, "tokens_per_s"),
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        age_s=age_s,
    )


def _state(events: list[dict[str, Any]], age_s: float) -> str:
    ends = [event.get("event") for event in events if event.get("event") in ("started", "finished", "failed")]
    if not ends:
        return "stopped"
    if ends[-1] != "started":
        return str(ends[-1])
    return "running" if age_s < _QUIET_S else "stopped"


def _last(records: list[dict[str, Any]], key: str) -> Any:
    return next((record[key] for record in reversed(records) if record.get(key) is not None), None)
