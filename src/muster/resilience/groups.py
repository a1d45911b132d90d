"""Replica groups as processes: started, ended as a whole when one rank ends, and started again while the others train.

Each group is a world of its own with a rendezvous of its own. The coordinator, which is served here, decides
who takes part; this module only makes its word come true.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from muster.config.faults import Timeouts
from muster.errors import TrainingError
from muster.observe import term
from muster.observe.records import RunLog
from muster.observe.room import Appender, say
from muster.parallel.world import usable_cores
from muster.resilience.between import COORDINATOR, GROUP, STORE, TOKEN
from muster.resilience.membership import Action, Committed, Decide, Fence, Lost
from muster.resilience.membership_server import Coordinator
from muster.resilience.ranks import Zygote

LEDGER = "ledger.jsonl"
"""In the run's folder: one line a committed step, with the samples that each group took."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STARTS_WITHOUT_A_STEP = 5
"""How often in a row a group is started that never gets as far as a committed step."""
_POLL_S = 0.05


class Child(Protocol):
    """A rank's process, as `subprocess.Popen`."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


Start = Callable[[Mapping[str, str]], Child]
"""Starts a rank with these additions to its environment."""


@dataclass
class _Group:
    index: int
    processes: list[Child] = field(default_factory=list)
    store: Any = None
    starts: int = 0
    """Since it last took part in a committed step."""
    not_before: float = 0.0
    term: str = ""
    """By which these processes may commit checkpoints, when this group leads."""


class Groups:
    """The processes of a run of `count` groups of `ranks` ranks; `run` returns when they are done."""

    def __init__(
        self,
        count: int,
        ranks: int,
        folder: Path,
        timeouts: Timeouts,
        start: Start,
        say: Callable[[str], None],
    ) -> None:
        import torch.distributed as dist

        self._ranks, self._folder, self._start, self._say = ranks, folder, start, say
        self._groups = [_Group(index) for index in range(count)]
        self._coordinator = Coordinator(count, ranks, timeouts, self._handle)
        self._store = _store(dist)
        self._key = secrets.token_hex(4)
        self._log = RunLog(folder)
        self._ledger_file = (folder / LEDGER).open("ab", buffering=0)
        self._ledger = Appender(self._ledger_file)
        self._term = ""
        self._lost: str | None = None
        self._first_error: tuple[str, int] | None = None

    def run(self) -> None:
        """TrainingError where no group is left to go on with."""
        try:
            while not self._finished():
                for group in self._groups:
                    self._tend(group)
                if self._lost is not None:
                    raise self._failure(self._lost)
                self._coordinator.serve(_POLL_S)
        finally:
            for group in self._groups:
                self._end(group)
            self._coordinator.close()
            self._ledger_file.close()
            self._log.close()

    def _finished(self) -> bool:
        """The last round is committed and its members have left; who else waits is no longer needed."""
        membership = self._coordinator.membership
        if not membership.done or membership.view is None:
            return False
        members = [self._groups[member] for member in membership.view.members]
        return all(process.poll() is not None for group in members for process in group.processes)

    def _tend(self, group: _Group) -> None:
        """Start a group that is down, and end one that has lost a rank."""
        membership = self._coordinator.membership
        if membership.done:
            return
        if group.processes:
            ended = [(rank, code) for rank, p in enumerate(group.processes) if (code := p.poll()) is not None]
            if ended:
                # One that was killed comes first: the others end because of it.
                rank, code = min(ended, key=lambda one: one[1] >= 0)
                self._bury(group, self._epitaph(group, rank, code))
        elif time.monotonic() >= group.not_before and group.starts < _STARTS_WITHOUT_A_STEP:
            self._launch(group)
        elif all(not each.processes and each.starts >= _STARTS_WITHOUT_A_STEP for each in self._groups):
            self._lost = f"every group ended {_STARTS_WITHOUT_A_STEP} times before the first step"

    def _launch(self, group: _Group) -> None:
        import torch.distributed as dist

        group.starts += 1
        group.term = term.new()
        group.store = _store(dist)  # the group's own rendezvous
        for rank in range(self._ranks):
            group.processes.append(self._start(self._environment(group, rank)))
        self._log.event("group-started", group=group.index, pids=[process.pid for process in group.processes])

    def _environment(self, group: _Group, rank: int) -> dict[str, str]:
        local = group.index * self._ranks + rank
        self._error_file(group, rank).unlink(missing_ok=True)
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._ranks),
            # Which device, and how many share the machine.
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(len(self._groups) * self._ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(group.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_ERROR_FILE": str(self._error_file(group, rank)),
            COORDINATOR: self._coordinator.address,
            TOKEN: self._coordinator.token,
            STORE: f"127.0.0.1:{self._store.port}",
            GROUP: str(group.index),
            term.TERM: group.term,
        }

    def _handle(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Committed):
                self._write_ledger(action)
                for index, _ in action.notes:
                    self._groups[index].starts = 0
            elif isinstance(action, Fence):
                self._bury(self._groups[action.group], f"group {action.group} {action.why}")
            elif isinstance(action, Lost):
                self._lost = action.why
            elif isinstance(action, Decide):
                self._let_commit(self._groups[action.view.members[0]])
                if action.view.sources or not action.committed:
                    self._tell(action)

    def _write_ledger(self, committed: Committed) -> None:
        notes = {who: note for who, note in committed.notes.items() if note}
        if not notes:
            return
        samples: dict[str, list[Any]] = {}
        for (group, _), note in sorted(notes.items()):
            samples.setdefault(str(group), []).extend(note["samples"])
        step = next(iter(notes.values()))["step"]
        line = {"time": time.time(), "step": step, "epoch": committed.epoch, "samples": samples}
        self._ledger.write(json.dumps(line).encode() + b"\n")

    def _let_commit(self, leader: _Group) -> None:
        """Before any rank hears who leads: the one before may be cut off, and not know."""
        if leader.term != self._term:
            self._term = leader.term
            term.grant(self._folder, leader.term)

    def _tell(self, decision: Decide) -> None:
        view = decision.view
        joined = [group for group in view.members if group in view.sources]
        said = f"epoch {view.epoch}: groups {', '.join(map(str, view.members))} train"
        if joined:
            said += f"; {', '.join(f'{g} takes the state from {s}' for g, s in view.sources.items())}"
        elif view.epoch > 1 and not decision.committed:
            said += "; the step under way is done again"
        self._say(said)
        self._log.event(
            "regrouped",
            message=said,
            epoch=view.epoch,
            round=view.round,
            members=view.members,
            newcomers=joined,
            aborted=not decision.committed and view.epoch > 1,
        )

    def _bury(self, group: _Group, why: str) -> None:
        """End what is left of a group, say why, and set the time of its return."""
        if not group.processes:
            return
        pause = min(_PAUSE_S * 2 ** (group.starts - 1) if group.starts else 0.0, _LONGEST_PAUSE_S)
        group.not_before = time.monotonic() + pause
        self._end(group)
        self._log.event("group-ended", message=why, group=group.index)
        self._say(why)
        self._coordinator.gone(group.index)

    def _end(self, group: _Group) -> None:
        for process in group.processes:
            if process.poll() is None:
                process.kill()
        for process in group.processes:
            while process.poll() is None:
                time.sleep(0.001)
        group.processes, group.store = [], None

    def _epitaph(self, group: _Group, rank: int, code: int) -> str:
        who = f"group {group.index}, rank {rank}"
        if code < 0:
            return f"{who} was killed by {signal.Signals(-code).name}"
        try:
            note = json.loads(self._error_file(group, rank).read_text())
            if self._first_error is None:
                self._first_error = f"{who}: {note['message']}", note["exit_code"]
            return f"{who}: {note['message'].strip().splitlines()[-1]}"
        except (OSError, ValueError, KeyError):
            return f"{who} ended with exit code {code}"

    def _failure(self, why: str) -> TrainingError:
        said = f"; {self._first_error[0]}" if self._first_error else ""
        return TrainingError(f"{why}{said}: run the same command again to resume from the newest checkpoint")

    def _error_file(self, group: _Group, rank: int) -> Path:
        return self._folder / "logs" / f"group-{group.index}-rank-{rank}.error.json"


class _Forked:
    """A rank that a zygote has forked."""

    def __init__(self, zygote: Zygote, argv: Sequence[str], env: dict[str, str], log: Path | None) -> None:
        self._zygote, self._asked = zygote, zygote.start(argv, env, log)
        while (pid := zygote.pid(self._asked)) is None:
            zygote.read()
        self.pid = pid

    def poll(self) -> int | None:
        self._zygote.read(wait=False)
        return self._zygote.code(self._asked)

    def kill(self) -> None:
        self._zygote.signal(self._asked, signal.SIGKILL)


def start_groups(
    argv: Sequence[str], count: int, ranks: int, folder: Path, timeouts: Timeouts, zygote: Zygote
) -> None:
    """Run `muster *argv` as `count` groups of `ranks` ranks, and keep the groups alive.

    Their first ranks write to this terminal (the group that leads does), the others to `logs/` in the run's folder.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(usable_cores() // (count * ranks), 1))

    def start(environment: Mapping[str, str]) -> Child:
        env = dict(os.environ) | {"OMP_NUM_THREADS": threads} | dict(environment)
        quiet = environment["RANK"] != "0"
        log = logs / f"group-{environment[GROUP]}-rank-{environment['RANK']}.log"
        return _Forked(zygote, argv, env, log if quiet else None)

    Groups(count, ranks, folder, timeouts, start, say).run()


def _store(dist: Any) -> Any:
    """A rendezvous on a port that the system chooses."""
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
