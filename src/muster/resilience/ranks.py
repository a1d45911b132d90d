"""One set of local ranks: started together, watched, ended together. What becomes of them is for others to decide.

Use: `zygote = Zygote()`, then for each attempt `ranks = Ranks(zygote, ...)`, `ranks.poll()` until `ranks.over`.
Several sets may live at the same time, on one zygote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from muster.errors import Preempted, TrainingError
from muster.observe.term import TERM
from muster.resilience.budget import Failure
from muster.resilience.lifeline import ERROR_FILE, STEP_FILE, read_step
from muster.resilience.verdict import Verdict
from muster.resilience.watchdog import Watchdog

_MESSAGE_LIMIT = 16_000
"""Characters of a traceback that travel; its end says most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a set of ranks lies in its world, and where the world meets."""

    first: int
    """Number of the first of these ranks."""
    ranks: int
    world: int
    host: str
    port: int
    """Of the store that the world meets at."""
    attempt: int = 0
    term: str = ""
    """By which the ranks may commit checkpoints (`observe/term.py`)."""
    name: str = ""
    """Of this world, where a run has several."""


class Forks(Protocol):
    """What starts processes for `Ranks`, and knows them by the number that `start` returns."""

    def start(self, argv: Sequence[str], env: dict[str, str], log: Path | None) -> int: ...
    def pid(self, asked: int) -> int | None: ...
    def code(self, asked: int) -> int | None: ...
    def signal(self, asked: int, number: signal.Signals) -> None: ...
    def forget(self, asked: int) -> None: ...
    def read(self, *, wait: bool = True) -> None: ...


class Zygote:
    """The process that forks ranks; one serves all sets of an agent. Loads torch in the background from the start.

    `preloaded` are the modules that it loads for its ranks, in place of those that train.
    """

    def __init__(self, preloaded: Sequence[str] = ()) -> None:
        self._socket, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "muster.resilience.zygote", str(there.fileno()), *preloaded],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's ^C is for the agent, which passes it on
                # Threads of numpy's would be there before the fork; ranks do no linear algebra in numpy.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        self._rest = b""
        self._asked = 0
        self._pids: dict[int, int] = {}
        self._codes: dict[int, int] = {}

    def fileno(self) -> int:
        """Readable when there is news, for `select`."""
        return self._socket.fileno()

    def start(self, argv: Sequence[str], env: dict[str, str], log: Path | None) -> int:
        """Ask for a rank; its number, for the other calls."""
        self._asked += 1
        log_name = None if log is None else str(log)
        self._send({"start": self._asked, "argv": list(argv), "env": env, "log": log_name})
        return self._asked

    def pid(self, asked: int) -> int | None:
        """None until it runs."""
        return self._pids.get(asked)

    def code(self, asked: int) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        pid = self._pids.get(asked)
        return None if pid is None else self._codes.get(pid)

    def signal(self, asked: int, number: signal.Signals) -> None:
        """Send a signal; before the rank runs, wait until it does."""
        while asked not in self._pids:
            self.read()
        if self.code(asked) is None:
            self._send({"signal": self._pids[asked], "number": int(number)})

    def forget(self, asked: int) -> None:
        self._codes.pop(self._pids.pop(asked, 0), None)

    def read(self, *, wait: bool = True) -> None:
        """Take in the news, at least one message if `wait`."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            received = self._socket.recv(1 << 16, 0 if wait else socket.MSG_DONTWAIT)
            if not received:
                raise TrainingError(
                    f"the process that starts ranks ended with exit code {self._process.wait()}: "
                    f"run the same command again to resume"
                )
            *lines, self._rest = (self._rest + received).split(b"\n")
            for message in map(json.loads, lines):
                if "started" in message:
                    self._pids[message["started"]] = message["pid"]
                else:
                    self._codes[message["ended"]] = message["code"]

    def close(self) -> None:
        """End it, and with it every rank that still runs."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the next read says so
            self._socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass(kw_only=True)
class Ranks:
    """Ranks `place.first` and up of one world, on this machine. `argv` is that of the command `muster`."""

    zygote: Forks
    argv: Sequence[str]
    place: Place
    logs: Path
    """Folder for the output of all ranks but the first of the world, which keeps the terminal."""
    environment: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """What a rank, by its local number, finds there beside what all do, or instead of it."""
    watchdog: Watchdog | None = None
    """Watches while they run; its verdict explains their end."""
    _notes: Path = field(init=False)
    _asked: list[int] = field(init=False)
    _killed: set[int] = field(default_factory=set, init=False)
    """Those that still ran when they were killed from here."""

    def __post_init__(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._notes = Path(tempfile.mkdtemp(prefix="muster-ranks-"))
        self._asked = [self._start(local) for local in range(self.place.ranks)]
        if self.watchdog is not None:
            self.watchdog.start()

    @property
    def over(self) -> bool:
        return all(self.zygote.code(asked) is not None for asked in self._asked)

    @property
    def pids(self) -> list[int | None]:
        return [self.zygote.pid(asked) for asked in self._asked]

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each, negative for a signal, None while it runs."""
        return [self.zygote.code(asked) for asked in self._asked]

    @property
    def step(self) -> int:
        """The furthest that any of these ranks came in this attempt; -1 where none finished a step."""
        steps = [read_step(self._step_file(local)) for local in range(self.place.ranks)]
        return max((step for step in steps if step is not None), default=-1)

    def signal(self, number: signal.Signals) -> None:
        """Send it to all that still run."""
        for asked in self._asked:
            self.zygote.signal(asked, number)

    def kill(self) -> None:
        self._killed |= {local for local, code in enumerate(self.codes) if code is None}
        self.signal(signal.SIGKILL)

    def failure(self, node: str = "") -> Failure | None:
        """The failure that explains the others best, None if no rank has failed by itself.

        A signal from outside comes first, then the earliest error that is not a mere consequence of a peer's death.
        """
        found = []
        if self.watchdog is not None and self.watchdog.verdict is not None:
            return self._judged(self.watchdog.verdict, node)
        for local, code in enumerate(self.codes):
            if code in (None, 0, Preempted.exit_code) or (local in self._killed and code == -signal.SIGKILL):
                continue
            assert code is not None
            note = self._note(local) if code > 0 else {}
            order = (code > 0, bool(note.get("consequence", False)), float(note.get("time", 0.0)))
            found.append((order, self._explain(local, code, note, node)))
        if found and self.watchdog is not None:
            killed = {f.rank: -signal.Signals[f.signal] for _, f in found if f.signal and f.rank is not None}
            if killed and (verdict := self.watchdog.conclude(killed)) is not None:
                return self._judged(verdict, node)
        return min(found, key=lambda one: one[0])[1] if found else None

    def preempted(self) -> str | None:
        """What the first rank that ended because it was asked to says; None where none did."""
        for local, code in enumerate(self.codes):
            if code == Preempted.exit_code:
                return str(self._note(local).get("message", "stopped: run the same command again to resume"))
        return None

    def close(self) -> None:
        """Forget the set once it is over."""
        for asked in self._asked:
            self.zygote.forget(asked)
        if self.watchdog is not None:
            self.watchdog.stop()
        shutil.rmtree(self._notes, ignore_errors=True)

    def _judged(self, verdict: Verdict, node: str) -> Failure:
        rank = verdict.ranks[0] if verdict.ranks else None
        local = None if rank is None else rank - self.place.first
        code = None if local is None else self.codes[local]
        by_signal = verdict.cause == "killed" and code is not None and code < 0
        note = self._note(local) if local is not None and verdict.cause == "failed" else {}
        return Failure(
            node=node,
            rank=rank,
            signal=signal.Signals(-code).name if by_signal and code else None,
            sentence=(f"{node}: " if node else "") + verdict.sentence[-_MESSAGE_LIMIT:],
            exit_code=verdict.exit_code,
            step=self.step,
            certain=bool(note.get("certain", verdict.exit_code in (2, 3, 4))),
            consequence=verdict.cause in ("elsewhere", "unknown"),
        )

    def _start(self, local: int) -> int:
        place = self.place
        rank = place.first + local
        log = None if rank == 0 else self.logs / f"rank-{rank:05d}.log"
        if log is not None:
            with log.open("a") as file:
                file.write(f"--- attempt {place.attempt}\n")
        env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(place.world),
            "LOCAL_WORLD_SIZE": str(place.ranks),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(place.attempt),
            TERM: place.term,
            **({} if self.watchdog is None else self.watchdog.environment),
            ERROR_FILE: str(self._notes / f"{local}.json"),
            STEP_FILE: str(self._step_file(local)),
            **self.environment.get(local, {}),
        }
        # Each rank gets its share of the machine's cores as threads unless the user says otherwise.
        return self.zygote.start(
            self.argv, dict(os.environ) | {"OMP_NUM_THREADS": _threads(place.ranks)} | env, log
        )

    def _step_file(self, local: int) -> Path:
        return self._notes / f"{local}.step"

    def _note(self, local: int) -> dict[str, Any]:
        try:
            note = json.loads((self._notes / f"{local}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _explain(self, local: int, code: int, note: dict[str, Any], node: str) -> Failure:
        rank = self.place.first + local
        who = f"rank {rank} on {node}" if node else f"rank {rank}"
        said = str(note.get("message", ""))[-_MESSAGE_LIMIT:]
        if code < 0:
            sentence = f"{who} was killed by {signal.Signals(-code).name}; its log is under {self.logs}"
        elif said:
            sentence = f"{who}: {said}"
        else:
            sentence = f"{who} ended with exit code {code}; its log is under {self.logs}"
        return Failure(
            node=node,
            rank=rank,
            signal=signal.Signals(-code).name if code < 0 else None,
            sentence=sentence,
            exit_code=TrainingError.exit_code if code < 0 else code,
            step=self.step,
            certain=bool(note.get("certain", code in (2, 3, 4))),
            consequence=bool(note.get("consequence", False)),
        )


def _threads(ranks: int) -> str:
    from muster.parallel.world import usable_cores

    return os.environ.get("OMP_NUM_THREADS") or str(max(usable_cores() // ranks, 1))
