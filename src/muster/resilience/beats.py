"""Heartbeats: what each rank is doing, in memory that another process reads although the rank is stopped or stuck.

One small file, mapped by the agent and by its ranks, holds a row of integers for each rank. A beat is a few stores into
it: no system call, no message, nothing allocated but integers (measured: 0.2 us for three of them). A store shared over
TCP would cost a round trip each, and need a rank's thread that still runs.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Phase = Literal[
    "setup",
    "data",
    "exchange",
    "forward",
    "backward",
    "optimizer",
    "evaluate",
    "save",
    "groups",
    "failed",
    "done",
]
"""What a rank can be in; `groups`: it waits for the other replica groups."""
PHASES: tuple[Phase, ...] = get_args(Phase)
TIMED: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer")
"""The phases of a step in which a rank computes by itself."""

_NUMBER = {phase: number for number, phase in enumerate(PHASES)}
_HEADER = 8
_REQUEST, _RELEASE = range(2)
_PID, _RANK, _STEP, _FIRST_STEP, _PHASE, _SINCE, _BEATS, _WAIT_SINCE, _WAITS = range(_TIMES := 9)
_ROWS, _ROW = 16, 1 + len(TIMED)
_WORDS = _TIMES + _ROWS * _ROW


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """A finished step of one rank: seconds in each of `TIMED`, without what it waited for others."""

    step: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """What a rank's row says."""

    pid: int
    rank: int
    step: int
    """The step it is in, counted from 1; 0 before the first."""
    is_first_step: bool
    """Whether that is the first one of this process."""
    phase: Phase
    in_phase_s: float
    beats: int
    waiting_s: float | None
    """How long it has waited for other ranks in one operation; None while it does not wait."""
    waits: int
    """Operations with other ranks that it has waited for to the end."""

    @property
    def mark(self) -> tuple[int, ...]:
        """Changes whenever the rank makes progress."""
        return self.pid, self.step, self.beats, self.waits


class Board:
    """The rows of the local ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        size = 8 * (_HEADER + ranks * _WORDS)
        if hasattr(os, "memfd_create"):  # nothing to be left behind, however the agent ends
            self._file = os.memfd_create("muster-beats")
            self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self.path = tempfile.mkstemp(prefix="muster-beats-")
        os.truncate(self._file, size)
        self._words = memoryview(mmap.mmap(self._file, size)).cast("q")

    def read(self) -> list[Pulse]:
        """Of the ranks that have begun, by their local number."""
        return [self._pulse(slot) for slot in range(self.ranks) if self._row(slot)[_PID]]

    def times(self, rank: int) -> list[StepTimes]:
        """The last finished steps of a rank, oldest first."""
        for slot in range(self.ranks):
            row = self._row(slot)
            if row[_PID] and row[_RANK] == rank:
                found = [list(row[_TIMES + i * _ROW : _TIMES + (i + 1) * _ROW]) for i in range(_ROWS)]
                rows = [StepTimes(step=r[0], seconds=tuple(ns / 1e9 for ns in r[1:])) for r in found if r[0]]
                return sorted(rows, key=lambda times: times.step)
        return []

    def request(self) -> int:
        """Ask every rank for its recorder's tail; returns the request's number."""
        self._words[_REQUEST] += 1
        return self._words[_REQUEST]

    def release(self) -> None:
        """Let ranks that have failed end: what they know has been taken down."""
        self._words[_RELEASE] = 1

    def close(self) -> None:
        os.close(self._file)
        if not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)

    def _row(self, slot: int) -> memoryview:
        return self._words[_HEADER + slot * _WORDS : _HEADER + (slot + 1) * _WORDS]

    def _pulse(self, slot: int) -> Pulse:
        row, now = self._row(slot), time.monotonic_ns()
        waiting = row[_WAIT_SINCE]
        return Pulse(
            pid=row[_PID],
            rank=row[_RANK],
            step=row[_STEP],
            is_first_step=row[_STEP] == row[_FIRST_STEP],
            phase=PHASES[row[_PHASE]],
            in_phase_s=(now - row[_SINCE]) / 1e9,
            beats=row[_BEATS],
            waiting_s=(now - waiting) / 1e9 if waiting else None,
            waits=row[_WAITS],
        )


class Beat:
    """One rank's row. Without a board it beats into memory that nobody reads."""

    def __init__(self, path: str | None = None, *, slot: int = 0, rank: int = 0) -> None:
        if path is None:
            self._header = memoryview(bytearray(8 * (_HEADER + _WORDS))).cast("q")
            slot = 0
        else:
            with open(path, "r+b") as file:
                self._header = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._row = self._header[_HEADER + slot * _WORDS : _HEADER + (slot + 1) * _WORDS]
        for index in range(_WORDS):
            self._row[index] = 0
        self._phase = _NUMBER["setup"]
        self._since, self._waited = time.monotonic_ns(), 0
        self._own = [0] * len(PHASES)
        self._row[_RANK], self._row[_SINCE] = rank, self._since
        self._row[_PID] = os.getpid()

    def enter(self, phase: Phase) -> None:
        """A phase begins, or makes progress; the one before has ended."""
        number, now, row = _NUMBER[phase], time.monotonic_ns(), self._row
        self._own[self._phase] += now - self._since - self._waited
        self._phase, self._since, self._waited = number, now, 0
        row[_PHASE], row[_SINCE] = number, now
        row[_BEATS] += 1

    def step(self, step: int) -> None:
        """Step `step`, counted from 1, begins with its data."""
        self.enter("data")
        own, row = self._own, self._row
        if done := row[_STEP]:
            at = _TIMES + done % _ROWS * _ROW
            row[at] = 0  # whoever reads now sees no row rather than half of one
            for index, phase in enumerate(TIMED):
                row[at + 1 + index] = own[_NUMBER[phase]]
            row[at] = done
        else:
            row[_FIRST_STEP] = step
        for number in range(len(own)):
            own[number] = 0
        row[_STEP] = step

    @property
    def requested(self) -> int:
        """The number of the agent's last request."""
        return int(self._header[_REQUEST])

    @property
    def released(self) -> bool:
        return bool(self._header[_RELEASE])

    def wait_begins(self, now_ns: int) -> None:
        """It waits for other ranks, which is not the phase's own time."""
        self._row[_WAIT_SINCE] = now_ns

    def wait_ends(self, waited_ns: int) -> None:
        self._waited += waited_ns
        self._row[_WAIT_SINCE] = 0
        self._row[_WAITS] += 1
