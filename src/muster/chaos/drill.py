"""A run of `muster train` under a schedule of faults: strikes, waits for what the run makes of it, and keeps score.

One fault at a time: the next one waits until the run has recovered from the last, so that each reaction has one cause,
and where ranks were started again, until a new checkpoint has made the budget of `faults.restarts` whole.
What muster is held to: it makes a step that it had not made before, and it says what was struck.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from muster.chaos import inject, within
from muster.chaos.links import Switchboard
from muster.chaos.schedule import Fault, Shape
from muster.chaos.strike import Outcome, RunOver, Strike
from muster.observe.records import EVENTS, METRICS, read_jsonl
from muster.resilience.ledger import LEDGER
from muster.resilience.lifeline import die_with_parent

_POLL_S = 0.02
_TAIL_BYTES = 1 << 20
_SETUP_PATIENCE = 12.0
"""Multiple of the run's patience within which it has to be over anything: its own for setting up is 10."""
_START_S = 60.0


@dataclass(kw_only=True)
class Drill:
    """Use `run` once; then `outcomes`, `exit_code` and `goodput` tell."""

    argv: Sequence[str]
    """Of the command `muster`: the run's."""
    folder: Path
    """The run's."""
    shape: Shape
    steps: int
    elastic: bool
    faults: Iterable[Fault]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.exit_code = 1
        self.goodput = 0.0
        """Share of the time since the first step that steps of the final curve took, at their undisturbed pace."""

    @property
    def log(self) -> Path:
        """What the run says on its terminal."""
        return self.folder / "logs" / "drill.log"

    def run(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="muster-drill-") as orders,
            Switchboard(seed=0) as self.board,
            self.log.open("ab") as out,
        ):
            self.orders, self._began = Path(orders), time.time()
            env = os.environ | {within.LINES: self.board.address, within.ORDERS: orders}
            command = [sys.executable, "-m", "muster", *self.argv]
            end_with_me = partial(die_with_parent, os.getpid())
            self.agent = subprocess.Popen(
                command, env=env, stdout=out, stderr=out, start_new_session=True, preexec_fn=end_with_me
            )
            try:
                with contextlib.suppress(RunOver):
                    self._strike_all()
                self.exit_code = self.agent.wait()
            finally:
                if self.agent.poll() is None:
                    self.agent.kill()  # its ranks end with it
                self.agent.wait()
        self.goodput = self._goodput()

    def _strike_all(self) -> None:
        self.until(lambda: self.step() > 0, float("inf"))
        self.first = time.time()
        for fault in self.faults:
            self.until(lambda at=fault.at_s: time.time() >= self.first + at, float("inf"))  # type: ignore[misc]
            self.until(self._is_whole, float("inf"))
            if fault.kind == "disk" and self._left_s() < 3 * fault.lasts_s:
                continue  # a run whose last checkpoint cannot be written has to end with an error
            outcome = Strike(self, fault).outcome()
            self.outcomes.append(outcome)
            self.say(f"          {outcome}")
            if outcome.recovered_s is None:
                return self.agent.kill()

    @property
    def limit_s(self) -> float:
        return _SETUP_PATIENCE * self.shape.patience_s + _START_S

    def ranks(self) -> dict[int, psutil.Process]:
        if self.elastic:
            return inject.ranks_of_groups(self.agent.pid, self.folder)
        return inject.ranks_of(self.agent.pid)

    def _is_whole(self) -> bool:
        """All ranks train."""
        if len(self.ranks()) < self.shape.ranks:
            return False
        if not self.elastic:
            restarts = self.events("restart")
            return not restarts or bool(self.events("checkpoint", since=restarts[-1]["time"]))
        groups = {event["group"] for event in self.events("group-started")}
        members = {int(group) for line in self._read(LEDGER)[-1:] for group in line["samples"]}
        return groups == members

    def events(self, *kinds: str, since: float = 0.0) -> list[dict[str, Any]]:
        since = max(since, self._began)
        return [e for e in self._read(EVENTS) if e.get("event") in kinds and e["time"] >= since]

    def _read(self, name: str) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / name, _TAIL_BYTES)

    def step(self, since: float = 0.0) -> int:
        """The furthest step that any record tells of."""
        since = max(since, self._began)
        return max((r["step"] for r in self._read(METRICS) if "loss" in r and r["time"] >= since), default=0)

    def until(self, reached: Callable[[], bool], limit_s: float) -> bool:
        """Wait; False where it took too long. RunOver where the run ended instead."""
        deadline = time.monotonic() + limit_s
        while not reached():
            if self.agent.poll() is not None:
                raise RunOver
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def _left_s(self) -> float:
        """Until the end of the run, if nothing more happens."""
        return float(self.steps - self.step()) * _step_s(self._records())

    def _goodput(self) -> float:
        records = self._records()
        if len(records) < 2:
            return 0.0
        steps = max(r["step"] for r in records) - min(r["step"] for r in records)
        took_s: float = records[-1]["time"] - records[0]["time"]
        return min(float(steps) * _step_s(records) / took_s, 1.0)

    def _records(self) -> list[dict[str, Any]]:
        records = read_jsonl(self.folder / METRICS)
        return [record for record in records if "loss" in record and record["time"] >= self._began]


def _step_s(records: Sequence[dict[str, Any]]) -> float:
    """Records do not tell how long a step took: the usual time between two that follow each other does."""
    gaps = [b["time"] - a["time"] for a, b in pairwise(records) if b["step"] == a["step"] + 1]
    return float(statistics.median(gaps)) if gaps else 0.0


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step of a run, as recorded last."""
    records = read_jsonl(folder / METRICS)
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def withdrawn(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run that say which batches it left out: a run that knows of them from the start equals it."""
    for event in read_jsonl(folder / EVENTS):
        if event.get("event") == "batches-withdrawn":
            yield {key: event[key] for key in ("event", "first", "last")}
