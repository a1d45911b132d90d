"""What a run folder says about its run, from its records alone; half-written folders are fine."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muster.observe.records import EVENTS, METRICS, in_use, read_jsonl

_TAIL_BYTES = 1 << 18
"""Enough records to find the last figure of each kind, however long the run."""
_ENDS = {"finished": "finished", "failed": "failed", "started": "stopped", "preempted": "stopped"}
"""What became of a run that nobody works on, by the last of these events: a killed one never says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """A run at a glance; a figure that its records do not hold is None."""

    name: str
    state: str
    """running, finished, failed, stopped (killed: the same command resumes it) or new (never started)."""
    step: int
    steps: int | None
    loss: float | None
    bits_per_byte: float | None
    """Held out."""
    tokens_per_s: float | None
    size_bytes: int
    age_s: float | None
    """Since the last record."""


def view(folder: Path) -> RunView | None:
    """The run in `folder`; None where there is none."""
    try:
        record = json.loads((folder / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
        return None
    events = read_jsonl(folder / EVENTS, _TAIL_BYTES)
    metrics = read_jsonl(folder / METRICS, _TAIL_BYTES)
    times = [entry["time"] for entry in events + metrics if _is_number(entry.get("time"))]
    ends = [_ENDS[kind] for entry in events if (kind := str(entry.get("event"))) in _ENDS]
    steps = record.get("steps")
    return RunView(
        name=folder.name,
        state="running" if in_use(folder) else ends[-1] if ends else "new",
        step=int(_last(events + metrics, "step") or 0),
        steps=steps if isinstance(steps, int) else None,
        loss=_last(metrics, "loss"),
        bits_per_byte=_last(metrics, "held_out_bits_per_byte"),
        tokens_per_s=_last(metrics, "tokens_per_s"),
        size_bytes=sum(_size(path) for path in folder.rglob("*")),
        age_s=max(time.time() - max(times), 0.0) if times else None,
    )


def _last(records: list[dict[str, Any]], key: str) -> float | None:
    return next((record[key] for record in reversed(records) if _is_number(record.get(key))), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except OSError:  # gone since it was listed
        return 0
