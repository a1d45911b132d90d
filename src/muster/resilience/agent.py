"""Keeps the ranks of one machine running: starts them, says which one failed and why, restarts and ends them.

An agent does what the job's coordinator says (`coordinator.py`): one agent, and its coordinator is a thread of it;
several (`--nodes`), and the agent that can listen at the rendezvous address has it. A rank is what
`python -m muster <the same arguments>` is with RANK set. The first failing rank's error becomes the command's: its
sentence, said last, and its exit code.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from muster.errors import MusterError, Preempted, TrainingError
from muster.observe.records import RunLog
from muster.observe.room import say
from muster.resilience.asked import Asked
from muster.resilience.budget import Budget, Failure
from muster.resilience.coordinator import Coordinator, Fitted, Outcome
from muster.resilience.lifeline import INTERRUPTED
from muster.resilience.ranks import Place, Ranks, Zygote
from muster.resilience.rendezvous import Closed, Link, Message, Monitor, Server, connect, listen
from muster.resilience.watchdog import Watchdog

_POLL_S = 0.05
_CAUSE_WAIT_S = 1.0
"""How long a rank that only lost its peer waits for the peer to be seen dead: its last moments take a while."""
_RETRY_S = 0.5
_DATA_AXES = ("replicate", "shard")
_HEAR_S = 5.0
_AGAIN = "run the same command again to resume from the newest checkpoint"


class Memory(Protocol):
    """What a node keeps of the run in its memory, outside the ranks."""

    def claim(self) -> None:
        """Called once, before anything else."""

    def serve(self, host: str) -> tuple[str, int] | None:
        """Let other nodes reach it at this machine's `host`; the address for them."""

    def environment(self, attempt: int, others: Sequence[tuple[str, int]]) -> Mapping[str, str]:
        """What the ranks of an attempt must know, where `others` are the memories that follow in the ring."""

    def close(self) -> None:
        """Give it back."""


class RankFailed(MusterError):
    """A rank ended with an error; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be kept running."""

    argv: Sequence[str]
    """Of the command `muster`, for each rank."""
    folder: Path
    """The run's."""
    digest: str
    """Of the run, by which agents know that they serve the same."""
    fit: Callable[[int], Fitted | None]
    needs: str
    committed: Callable[[], int]
    """See `Coordinator` for these three."""
    restarts: int
    grace_s: float
    watch: Callable[[Place], Watchdog] | None = None
    """Makes the watchdog of a set of ranks."""
    memory: Memory | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The agents that take part."""

    minimum: int = 1
    maximum: int = 1
    rendezvous: tuple[str, int] | None = None
    """Where they meet; None where there is only this one."""
    slots: int
    """Ranks that this one can hold."""


def start_ranks(job: Job, nodes: Nodes, zygote: Zygote, monitor: Monitor | None = None) -> None:
    """Keep the ranks of `job` running until it is done. RankFailed with the failure that ended it, or Preempted."""
    agent = _Agent(job=job, nodes=nodes, zygote=zygote, monitor=monitor)
    with agent.asked.listens(), contextlib.ExitStack() as at_end:
        if job.memory is not None:
            job.memory.claim()
            at_end.callback(job.memory.close)
        agent.run()


@dataclass(kw_only=True)
class _Agent:
    job: Job
    nodes: Nodes
    zygote: Zygote
    monitor: Monitor | None
    asked: Asked = field(default_factory=Asked, init=False)
    _ranks: Ranks | None = field(default=None, init=False)
    _name: str = field(default="", init=False)
    _passed_on: bool = field(default=False, init=False)
    _failed_at: float | None = field(default=None, init=False)
    _deadline: float | None = field(default=None, init=False)
    """When ranks that were asked to stop are killed."""
    _overdue: bool = field(default=False, init=False)
    _farewell: str = field(default="", init=False)
    _hear_until: float = field(default=0.0, init=False)

    def run(self) -> None:
        while True:
            server, link = self._meet()
            try:
                if self._follow(link, hosts=server is not None):
                    return
            finally:
                link.close()
                if server is not None:
                    server.close()
            if self.nodes.rendezvous is None:
                raise TrainingError(
                    "the coordinator of this run has failed: run the same command again to resume"
                )
            say("the node at the rendezvous is gone: waiting for it to be started again")

    def _meet(self) -> tuple[Server | None, Link]:
        """Become the coordinator's host, or reach it, however long that takes."""
        address = self.nodes.rendezvous
        while address is not None:
            listener = listen(address)
            if listener is not None:
                return self._serve(listener, address[0])
            link = connect(address)
            if link is not None:
                return None, link
            if self.asked.signal:
                raise Preempted(
                    f"stopped by {self.asked.signal} before the nodes had met: run the same command again"
                )
            time.sleep(_RETRY_S)
        return self._serve(None, "127.0.0.1")

    def _serve(self, listener: socket.socket | None, host: str) -> tuple[Server, Link]:
        job = self.job
        coordinator = Coordinator(
            minimum=self.nodes.minimum,
            maximum=self.nodes.maximum,
            fit=job.fit,
            needs=job.needs,
            committed=job.committed,
            budget=Budget(restarts=job.restarts),
        )
        server = Server(
            coordinator=coordinator,
            listener=listener,
            host=host,
            digest=job.digest,
            log=RunLog(job.folder),
            monitor=self.monitor,
        )
        return server, server.start()

    def _follow(self, link: Link, *, hosts: bool) -> bool:
        """Obey the coordinator; True when the job is done, False when the coordinator is gone."""
        link.send(
            {
                "type": "join",
                "host": socket.gethostname(),
                "slots": self.nodes.slots,
                "digest": self.job.digest,
                "memory": self._serve_memory(link, hosts),
            }
        )
        while True:
            if self.asked.at_once:
                self._end_ranks()
                raise RankFailed(f"stopped at once, without a checkpoint: {_AGAIN}", INTERRUPTED)
            if self.asked.signal and self._ranks is None and time.monotonic() >= self._hear_until:
                raise Preempted(
                    self._farewell or f"stopped by {self.asked.signal} while no rank ran: {_AGAIN}"
                )
            ready, _, _ = select.select([link.fileno(), self.zygote.fileno()], [], [], _POLL_S)
            if self.zygote.fileno() in ready:
                self.zygote.read(wait=False)
            try:
                for message in link.read() if link.fileno() in ready else []:
                    if self._obey(message):
                        return True
                link.beat()
            except Closed:
                self._end_ranks()
                return False
            outcome = self._watch()
            if outcome is not None:
                leaving = (
                    self.asked.signal is not None and not hosts and self.nodes.minimum < self.nodes.maximum
                )
                told = asdict(replace(outcome, leaving=leaving))
                link.send({"type": "ended"} | told)
                if leaving:
                    raise Preempted(outcome.sentence)
                if self.asked.signal:  # hear how the others end
                    self._farewell = outcome.sentence
                    self._hear_until = time.monotonic() + self.job.grace_s + _HEAR_S

    def _serve_memory(self, link: Link, hosts: bool) -> tuple[str, int] | None:
        address = self.nodes.rendezvous
        if self.job.memory is None or address is None:
            return None
        return self.job.memory.serve(address[0] if hosts else link.host)

    def _obey(self, message: Message) -> bool:
        """Do as the coordinator says; True if the job is done."""
        kind = message["type"]
        if kind == "welcome":
            self._name = message["name"] if self.nodes.maximum > 1 else ""
        elif kind == "start":
            place = Place(**message["place"])
            sizes = message["sizes"]  # numbers only: nobody else says what runs here
            argv = [
                *self.job.argv,
                *(f"layout.{axis}={int(sizes[axis])}" for axis in _DATA_AXES if axis in sizes),
            ]
            self._passed_on, self._failed_at, self._deadline, self._overdue = False, None, None, False
            watchdog = None if self.job.watch is None else self.job.watch(place)
            told = message["memory"]
            others = [(str(host), int(port)) for host, port in told["others"]]
            memory = self.job.memory
            known = {} if memory is None else memory.environment(int(told["attempt"]), others)
            self._ranks = Ranks(
                zygote=self.zygote,
                argv=argv,
                place=place,
                logs=self.job.folder / "logs",
                watchdog=watchdog,
                environment=dict.fromkeys(range(place.ranks), known),
            )
        elif kind == "stop" and self._ranks is not None:
            if message["how"] == "kill":
                self._ranks.kill()
            else:
                self._ask_ranks(self._ranks)
        elif kind == "say":
            say(message["sentence"])
        elif kind == "end":
            self._end_ranks()
            if message["exit_code"] == Preempted.exit_code:
                raise Preempted(message["sentence"])
            if message["exit_code"]:
                raise RankFailed(message["sentence"], message["exit_code"])
            return True
        return False

    def _watch(self) -> Outcome | None:
        """See to the ranks; how they ended, once none is left."""
        ranks = self._ranks
        if ranks is None:
            return None
        if self.asked.signal and not self._passed_on:
            self._ask_ranks(ranks)
        failure, preempted = ranks.failure(self._name), ranks.preempted()
        now = time.monotonic()
        if preempted is not None and self._deadline is None:  # a rank was asked by somebody else
            self._deadline = now + self.job.grace_s
        if failure is not None and not ranks.over:
            self._failed_at = self._failed_at or now
            if not failure.consequence or now >= self._failed_at + _CAUSE_WAIT_S:
                ranks.kill()
        if self._deadline is not None and now >= self._deadline and not ranks.over:
            self._overdue = True
            ranks.kill()
        if not ranks.over:
            return None
        failure, preempted = ranks.failure(self._name), ranks.preempted()
        codes = ranks.codes
        ranks.close()
        self._ranks = None
        return self._outcome(failure, preempted, done=all(code == 0 for code in codes))

    def _outcome(self, failure: Failure | None, preempted: str | None, *, done: bool) -> Outcome:
        overdue = f"did not save within {self.job.grace_s:g} s (faults.grace)"
        if done:
            return Outcome(kind="done")
        if self.asked.signal is not None:  # whatever happened, nobody wants a restart now
            if self._overdue:
                sentence = (
                    f"stopped by {self.asked.signal}, but the ranks {overdue} and were killed: {_AGAIN}"
                )
            elif failure is not None:
                sentence = (
                    f"stopped by {self.asked.signal} without a checkpoint ({failure.sentence}): {_AGAIN}"
                )
            else:
                sentence = preempted or f"stopped by {self.asked.signal}: {_AGAIN}"
            return Outcome(kind="preempted", sentence=sentence)
        if failure is not None:
            return Outcome(kind="failed", failure=failure)
        if self._overdue:
            failure = Failure(
                sentence=f"ranks that were asked to stop {overdue} and were killed", node=self._name
            )
            return Outcome(kind="failed", failure=failure)
        if preempted is not None:
            return Outcome(kind="preempted", sentence=preempted)
        return Outcome(kind="stopped")

    def _ask_ranks(self, ranks: Ranks) -> None:
        self._passed_on = True
        self._deadline = time.monotonic() + self.job.grace_s
        ranks.signal(signal.SIGTERM)

    def _end_ranks(self) -> None:
        if self._ranks is None:
            return
        self._ranks.kill()
        while not self._ranks.over:
            self.zygote.read()
        self._ranks.close()
        self._ranks = None
