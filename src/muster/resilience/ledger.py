"""The ledger of a run of replica groups: which samples each group took in each committed step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from muster.observe.room import Appender
from muster.resilience.membership import Committed

LEDGER = "ledger.jsonl"
"""In the run's folder: one line a committed step. Of several lines of a step the last one counts: the guard refused the
others, or the run went back to a checkpoint before them, as `events.jsonl` says."""


class Ledger:
    def __init__(self, folder: Path) -> None:
        self._file = (folder / LEDGER).open("ab", buffering=0)
        self._lines = Appender(self._file)

    def write(self, committed: Committed) -> str | None:
        """Note a committed sum, where it is a step's; says what is wrong where groups took part in different steps."""
        notes = {who: note for who, note in sorted(committed.notes.items()) if note}
        if not notes:
            return None
        steps = {int(note["step"]) for note in notes.values()}
        if len(steps) > 1:
            return f"groups were at different steps ({', '.join(map(str, sorted(steps)))}) and summed all the same"
        samples: dict[str, list[Any]] = {}
        for (group, _), note in notes.items():
            samples.setdefault(str(group), []).extend(note["samples"])
        line = {"time": time.time(), "step": steps.pop(), "epoch": committed.epoch, "samples": samples}
        self._lines.write(json.dumps(line).encode() + b"\n")
        return None

    def close(self) -> None:
        self._file.close()
