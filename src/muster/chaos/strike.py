"""One fault of a drill, from the moment it strikes until the run has recovered; and whether muster named it."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from muster.chaos import inject, within
from muster.chaos.links import FAIR, Line, Weather
from muster.chaos.schedule import Fault
from muster.checkpoint import shelf

if TYPE_CHECKING:
    from muster.chaos.drill import Drill

_DELAY = Weather(latency_s=0.02, jitter_s=0.02)
_STEPS_TO_SEE_SLOWNESS = 40
"""Steps within which `resilience/slow.py` is held to find a rank that runs a fifth of the time."""
_SILENCE = "it said nothing"
_NETWORK = re.compile("network|[Cc]onnection|did not vote|no longer part of the run")
"""How muster says that it was nobody's fault but the network's."""


class RunOver(Exception):
    """The run ended while a fault was waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a fault."""

    fault: Fault
    at_s: float
    """When it struck, on the schedule's clock."""
    what: str
    """What was done to whom: `SIGKILL to rank 1 (pid 4711)`."""
    recovered_s: float | None
    """From the fault, or from when it was lifted, to a step that had not been made before; None where none came."""
    named: bool | None
    """Whether muster named what was struck; None where there was nothing to say."""
    said: str

    def __str__(self) -> str:
        after = "NOT RECOVERED" if self.recovered_s is None else f"recovered after {self.recovered_s:.1f} s"
        named = {True: "named right", False: "NAMED WRONG", None: "nothing to name"}[self.named]
        return f"{after}, {named}" + (f": {self.said}" if self.said else "")


class Strike:
    """One fault: `outcome` has it strike, lifts it when its time is over, and waits for what the run makes of it."""

    def __init__(self, drill: Drill, fault: Fault) -> None:
        self._drill, self._fault = drill, fault
        self._chance = random.Random(fault.seed)
        self._ranks = drill.ranks()
        self._before = drill.step()
        self._since = time.time()
        self._what = ""

    def outcome(self) -> Outcome:
        drill, fault = self._drill, self._fault
        at_s = self._since - drill.first
        finished = True
        try:
            lifted = getattr(self, f"_{fault.kind}")()
            finished = self._recovers(lifted)
        except RunOver:
            finished = drill.agent.wait() == 0
            lifted = time.time()
        took = time.time() - lifted if finished else None
        named, said = self._named()
        if drill.agent.poll() is not None and said == _SILENCE:
            named, said = None, "the run ended before it could notice"
        return Outcome(fault=fault, at_s=at_s, what=self._what, recovered_s=took, named=named, said=said)

    def _recovers(self, lifted: float) -> bool:
        drill = self._drill
        if self._fault.kind == "disk" and self._tried:
            return drill.until(lambda: bool(drill.events("checkpoint", since=lifted)), drill.limit_s)
        if self._ends_ranks:
            return drill.until(lambda: self._goes_on_after_an_end(), drill.limit_s)
        # One step may have been done, but not told of, when the fault struck.
        return drill.until(lambda: drill.step(lifted) > self._before + 1, drill.limit_s)

    @property
    def _ends_ranks(self) -> bool:
        """Whether the run has to replace the rank."""
        return self._fault.kind in ("kill", "flip") or (self._fault.kind, self._fault.how) == ("stop", "long")

    def _goes_on_after_an_end(self) -> bool:
        ends = self._drill.events("restart", "group-ended", since=self._since)
        return bool(ends) and self._drill.step(ends[0]["time"]) > self._before

    def _tell(self, what: str) -> None:
        self._what = what
        fault = self._fault
        self._drill.say(
            f"{self._since - self._drill.first:7.1f} s  fault {fault.number}, {fault.kind}: {what}"
        )

    @property
    def _target(self) -> psutil.Process:
        return self._ranks[self._fault.rank]

    @property
    def _who(self) -> str:
        """As muster names it."""
        if not self._drill.elastic:
            return f"rank {self._fault.rank}"
        return f"group {self._fault.rank // self._per_group}"

    @property
    def _per_group(self) -> int:
        groups = {event["group"] for event in self._drill.events("group-started")}
        return self._drill.shape.ranks // max(len(groups), 1)

    # Each strikes, lifts the fault when its time is over, and returns when that was.

    def _kill(self) -> float:
        self._tell(f"SIGKILL to rank {self._fault.rank} (pid {self._target.pid})")
        inject.send(self._target, signal.SIGKILL)
        return time.time()

    def _stop(self) -> float:
        fault = self._fault
        self._tell(f"SIGSTOP to rank {fault.rank} (pid {self._target.pid}) for {fault.lasts_s:.1f} s at most")
        with inject.stopped([self._target]):
            self._drill.until(lambda: not self._target.is_running(), fault.lasts_s)
        return time.time()

    def _slow(self) -> float:
        fault, drill = self._fault, self._drill
        self._tell(
            f"rank {fault.rank} (pid {self._target.pid}) runs a fifth of the time for {fault.lasts_s:.0f} s at most"
        )
        with inject.slowed(self._target):
            drill.until(
                lambda: any(f"{self._who} is slow" in said for said in self._seen("slow-rank")), fault.lasts_s
            )
        self._steps_slow = drill.step() - self._before
        return time.time()

    def _disk(self) -> float:
        fault, drill = self._fault, self._drill
        self._tried = False
        self._tell(f"no rank can write to a file for {fault.lasts_s:.0f} s at most")
        with inject.disk_full(list(self._ranks.values())):
            self._untouched = self._state_of_shelf()
            self._tried = drill.until(self._a_save_failed, fault.lasts_s)
        return time.time()

    def _a_save_failed(self) -> bool:
        """Something came and went, and it was no checkpoint."""
        before, now = self._untouched, self._state_of_shelf()
        if before[1] != now[1]:
            self._untouched = now
        return before[0] != now[0] and before[1] == now[1] and not any(self._shelf.glob("*.partial"))

    def _state_of_shelf(self) -> tuple[int, list[int]]:
        changed = self._shelf.stat().st_mtime_ns if self._shelf.exists() else 0
        return changed, shelf.steps(self._shelf)

    def _flip(self) -> float:
        drill = self._drill
        drill.until(lambda: len(shelf.steps(self._shelf)) > 1, float("inf"))
        self._ranks = drill.ranks()
        with inject.stopped(
            list(self._ranks.values())
        ):  # so that no newer checkpoint comes before it is read
            newest = shelf.folder_of(self._shelf, shelf.steps(self._shelf)[-1])
            files = sorted(path for path in newest.iterdir() if path.stat().st_size)
            self._flipped = self._chance.choice(files)
            where = inject.flip_bit(self._flipped, self._chance)
            inject.send(self._target, signal.SIGKILL)
        self._before, self._since = drill.step(), time.time()
        self._tell(
            f"a bit of byte {where} of {self._flipped}, and SIGKILL to rank {self._fault.rank}, so that it is read"
        )
        return time.time()

    def _poison(self) -> float:
        self._tell(f"nan or inf in a gradient of rank {self._fault.rank}")
        within.order_poison(self._drill.orders, self._fault.rank, self._fault.seed)
        self._drill.until(lambda: bool(self._seen("batches-withdrawn")), self._drill.limit_s)
        return time.time()

    def _link(self) -> float:
        fault, board = self._fault, self._drill.board
        self._line = line = self._chance.choice(self._lines())
        course = {"delay": "20 to 40 ms late", "short": "stalled", "long": "stalled", "reset": "reset"}[
            fault.how
        ]
        self._tell(f"{line}: {course}" + (f" for {fault.lasts_s:.1f} s at most" if fault.lasts_s else ""))
        if fault.how == "reset":
            board.reset(line)
            return time.time()
        board.set(line, _DELAY if fault.how == "delay" else Weather(stalled=True))
        try:
            self._drill.until(lambda: not line.alive or not self._all_run(), fault.lasts_s)
        finally:
            board.set(line, FAIR)
        return time.time()

    def _lines(self) -> list[Line]:
        """The links of the rank that are in use, and those between any ranks, which all wait for."""
        alive = [line for line in self._drill.board.lines if line.alive]
        mine = [line for line in alive if line.who == f"rank {self._fault.rank}" or line.what == "peers"]
        return mine or alive or self._drill.board.lines

    def _all_run(self) -> bool:
        return all(process.is_running() for process in self._ranks.values())

    @property
    def _shelf(self) -> Path:
        return self._drill.folder / "checkpoints"

    def _seen(self, *kinds: str) -> list[str]:
        return [str(event.get("message", "")) for event in self._drill.events(*kinds, since=self._since)]

    def _named(self) -> tuple[bool | None, str]:
        """Whether what muster said since is right, and what that was."""
        fault = self._fault
        ends = self._seen("restart", "group-ended")
        if fault.kind == "poison":
            return self._check(self._seen("batches-withdrawn"), self._who)
        if fault.kind == "flip":
            resumed = self._drill.events("resumed", since=self._since)
            if resumed and resumed[0]["source"] == "memory":
                return None, ""  # the copies in memory were newer, so nobody read the file
            return self._check(self._seen("checkpoint-damaged"), str(self._flipped))
        if fault.kind == "disk":
            if ends:  # a full disk is to stop nobody
                return False, ends[0]
            return self._check(self._seen("checkpoint-failed"), "is not saved") if self._tried else (None, "")
        if fault.kind == "slow":
            seen = [sentence for sentence in self._seen("slow-rank") if " is slow" in sentence]
            if not seen and (self._drill.elastic or self._steps_slow < _STEPS_TO_SEE_SLOWNESS):
                return None, ""
            return self._check(seen, f"{self._who} is slow")
        if fault.kind == "link":
            return self._check(ends, _NETWORK) if ends else (None, "")
        if fault.kind == "stop" and fault.how == "short":
            return (False, ends[0]) if ends else (None, "")
        return self._check(ends, self._who)

    def _check(self, said: Sequence[str], words: str | re.Pattern[str]) -> tuple[bool, str]:
        pattern = re.compile(rf"{re.escape(words)}(?![0-9])") if isinstance(words, str) else words
        right = [sentence for sentence in said if pattern.search(sentence)]
        return bool(right), (right or list(said) or [_SILENCE])[0]
