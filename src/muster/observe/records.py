"""Append-only records of a run: events.jsonl (what happened) and metrics.jsonl (figures by step).

One record is one line in one write. Not-a-number and infinity, which JSON lacks, are written as null.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to the records of the run in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = (folder / "events.jsonl").open("a", buffering=1)
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)

    def event(self, kind: str, **fields: Any) -> None:
        self._events.write(_line({"time": time.time(), "event": kind, **fields}))

    def metrics(self, step: int, **fields: float) -> None:
        self._metrics.write(_line({"time": time.time(), "step": step, **fields}))

    def close(self) -> None:
        self._events.close()
        self._metrics.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a missing file has none, and a line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in record.items()}) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
