"""Append-only records of a run: events.jsonl (what happened) and metrics.jsonl (figures by step).

One record is one line in one write, so a kill can only cut the last line short, and whoever reads
along never sees half of one. Not-a-number and infinity, which JSON lacks, are written as null.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from io import FileIO
from pathlib import Path
from typing import Any

from muster.observe.room import Appender, or_not_at_all

EVENTS, METRICS = "events.jsonl", "metrics.jsonl"


class RunLog:
    """Appends to the records of the run in `folder`, which is made if it is missing.

    An open log holds a lock on events.jsonl, by which `in_use` knows that the run is alive: the system
    lets go of it however the process ends.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = _open(folder / EVENTS), _open(folder / METRICS)
        self._events, self._metrics = map(Appender, self._files)
        _lock(self._files[0], fcntl.LOCK_EX)

    def event(self, kind: str, **fields: Any) -> None:
        self._events.write(_line({"time": time.time(), "event": kind, **fields}))

    def metrics(self, step: int, **fields: float) -> None:
        self._metrics.write(_line({"time": time.time(), "step": step, **fields}))

    def close(self) -> None:
        for file in self._files:
            file.close()


def in_use(folder: Path) -> bool:
    """Whether a process on this machine has the records of the run in `folder` open."""
    try:
        with (folder / EVENTS).open("rb", buffering=0) as events:
            return not _lock(events, fcntl.LOCK_SH)
    except OSError:
        return False


def read_jsonl(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of a file, or those in its last bytes; a missing file has none.

    A line that a kill cut short is left out.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0 if last_bytes is None else max(size - last_bytes, 0))
            content = file.read()
    except OSError:
        return []
    records = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _open(path: Path) -> FileIO:
    file = path.open("ab+", buffering=0)
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            with or_not_at_all():
                file.write(b"\n")  # so that the next record does not continue a line that a kill cut short
    return file


def _lock(file: FileIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:  # taken, or a file system without locks: records matter more than who is alive
        return False
    return True


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(_finite(record), default=_plain, allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as numbers, everything else as its text."""
    return _finite(value.item()) if hasattr(value, "item") else str(value)
