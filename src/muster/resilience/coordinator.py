"""Who trains, with how many ranks, and what happens when some of it fails: a state machine over plain data.

It is told what happened and at what time, and answers what to do; it knows no clock, socket or process, so it is
tested on virtual time. `rendezvous.py` carries its orders, `agent.py` carries them out.

A node is one agent and the ranks that it can hold. Nodes take their ranks in the order in which they joined, one that
failed twice in a row last; nodes that the layout does not need are spares, which idle until they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from muster.errors import Preempted
from muster.resilience.budget import Budget, Failure

JOIN_WAIT_S = 15.0
"""How long the first start waits for further nodes when there are enough, but not all."""
SETTLE_S = 3.0
"""How long a node must have been there before a running attempt is interrupted to take it in."""
CAUSE_WAIT_S = 0.3
"""How long a rank that only lost its peer waits for the peer's node to say why."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """What can be trained on a number of ranks."""

    world: int
    """Ranks used of them."""
    sizes: dict[str, int]
    """Of the data axes; empty where the number of ranks says all."""
    wanted: bool
    """It is all that the run file asks for."""


@dataclass(frozen=True, slots=True)
class Start:
    attempt: int
    places: dict[str, tuple[int, int]]
    """First rank and number of ranks, by node."""
    world: int
    sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Stop:
    nodes: tuple[str, ...]
    how: Literal["kill", "checkpoint"]


@dataclass(frozen=True, slots=True)
class Say:
    """An event for the run's records and a sentence for its terminals."""

    kind: str
    sentence: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    exit_code: int
    sentence: str


Action = Start | Stop | Say | End


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the ranks of a node ended."""

    kind: Literal["done", "failed", "preempted", "stopped"]
    """preempted: they were asked to stop, and saved; stopped: they were killed because others had failed."""
    sentence: str = ""
    failure: Failure | None = None
    leaving: bool = False
    """The node itself was asked to stop, and takes part no longer."""


@dataclass(slots=True)
class _Node:
    slots: int
    joined_at: float


@dataclass(kw_only=True)
class Coordinator:
    minimum: int
    maximum: int
    """Nodes; beyond what the layout needs they are spares."""
    fit: Callable[[int], Fitted | None]
    """What can be trained on so many ranks; None if nothing can."""
    needs: str
    """What the least is that can be trained, for the message of one who waits."""
    committed: Callable[[], int]
    """Step of the newest checkpoint; 0 without one."""
    budget: Budget
    explain: Callable[[Failure], Failure] = lambda failure: failure
    """What a watcher knows better about the failure that ended an attempt."""
    attempt: int = field(default=0, init=False)
    over: bool = field(default=False, init=False)
    alive: set[str] = field(default_factory=set, init=False)
    """Nodes whose ranks run."""
    _nodes: dict[str, _Node] = field(default_factory=dict, init=False)
    _last: list[str] = field(default_factory=list, init=False)
    """Nodes that failed twice in a row, the latest last."""
    _streak: tuple[str, int] = field(default=("", 0), init=False)
    _world: int = field(default=0, init=False)
    _started_at: float = field(default=0.0, init=False)
    _not_before: float = field(default=0.0, init=False)
    _kill_at: float | None = field(default=None, init=False)
    _cause: Failure | None = field(default=None, init=False)
    _preempted: Outcome | None = field(default=None, init=False)
    _growing: bool = field(default=False, init=False)
    _waiting_for: str = field(default="", init=False)

    def joined(self, name: str, slots: int, now: float) -> list[Action]:
        self._nodes[name] = _Node(slots, now)
        said = Say("node-joined", f"node {name} joined with {slots} ranks", {"node": name, "ranks": slots})
        return ([said] if self.maximum > 1 else []) + self.tick(now)

    def lost(self, name: str, now: float) -> list[Action]:
        """The connection to a node's agent has closed."""
        if self._nodes.pop(name, None) is None:
            return []
        actions: list[Action] = [Say("node-lost", f"node {name} is gone", {"node": name})]
        if name in self.alive:
            self.alive.discard(name)
            if self._cause is None or self._cause.consequence:
                self._cause = Failure(sentence=f"node {name} was lost with its ranks", node=name)
            self._kill_at = None
            actions += self._stop("kill")
        return actions + self._settle(now)

    def ended(self, name: str, outcome: Outcome, now: float) -> list[Action]:
        """No rank of a node runs any more."""
        if name not in self.alive:
            return []
        self.alive.discard(name)
        actions: list[Action] = []
        if outcome.failure is not None:
            if self._cause is None or (self._cause.consequence and not outcome.failure.consequence):
                self._cause = outcome.failure
            if self._cause.consequence and self._kill_at is None:
                self._kill_at = now + CAUSE_WAIT_S
            elif not self._cause.consequence:
                actions += self._stop("kill")
        elif outcome.kind == "preempted":
            if self._preempted is None:
                self._preempted = outcome
                actions += self._stop("checkpoint")
            if outcome.leaving:
                self._nodes.pop(name, None)
        elif outcome.kind == "stopped" and self._cause is None:
            self._cause = Failure(sentence=f"the ranks of {name} were killed by nobody's order", node=name)
            actions += self._stop("kill")
        return actions + self._settle(now)

    def complain(self, sentence: str, now: float) -> list[Action]:
        """Whoever watches the ranks wants them restarted, and says why."""
        if not self.alive or self._cause is not None:
            return []
        self._cause = Failure(sentence=sentence)
        return [*self._stop("kill"), *self._settle(now)]

    def tick(self, now: float) -> list[Action]:
        if self.over:
            return []
        if self.alive:
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_at = None
                return self._stop("kill")
            return self._grow(now)
        return self._start(now)

    def _settle(self, now: float) -> list[Action]:
        """Once an attempt is over, decide what follows."""
        if self.alive or self.over or self.attempt == 0 or not self._world:
            return []
        self._world, self._kill_at = 0, None
        cause, preempted, growing = self._cause, self._preempted, self._growing
        self._cause, self._preempted, self._growing = None, None, False
        if cause is not None:
            return self._restart(cause, now)
        if preempted is None:
            return self._end(0, "")
        if growing:
            return self._start(now)
        if preempted.leaving and self._place() is not None:
            return [Say("node-left", preempted.sentence), *self._start(now)]
        return self._end(Preempted.exit_code, preempted.sentence)

    def _restart(self, cause: Failure, now: float) -> list[Action]:
        cause = self.explain(cause)
        actions: list[Action] = []
        verdict = self.budget.failed(cause, self.committed())
        fields = {
            "rank": cause.rank,
            "signal": cause.signal,
            "node": cause.node,
            "attempt": self.attempt,
            "seconds": now - self._started_at,
            "step": cause.step,
        }
        if verdict.delay_s is None:
            actions.append(Say("gave-up", verdict.why, fields | {"error": cause.sentence}))
            # The failure itself is what a user sees last.
            last = f"{verdict.why}\n{cause.sentence}" if verdict.why else cause.sentence
            return actions + self._end(cause.exit_code, last)
        if cause.node:
            before, times = self._streak
            self._streak = (cause.node, times + 1 if cause.node == before else 1)
            if self._streak[1] == 2:
                self._last = [name for name in self._last if name != cause.node] + [cause.node]
        self._not_before = now + verdict.delay_s
        when = f" in {verdict.delay_s:.0f} s" if verdict.delay_s else ""
        said = f"{_last_line(cause.sentence)}; {verdict.why}{when}, from the checkpoint of step {self.committed()}"
        actions.append(Say("restart", said, fields | {"error": cause.sentence, "delay_s": verdict.delay_s}))
        return actions + self._start(now)

    def _start(self, now: float) -> list[Action]:
        if now < self._not_before:
            return []
        placed = self._place()
        if placed is None:
            return self._wait()
        fitted, places = placed
        everyone = len(self._nodes) >= self.maximum or fitted.wanted
        newest = max(node.joined_at for node in self._nodes.values())
        if self.attempt == 0 and not everyone and now < newest + JOIN_WAIT_S:
            return []
        self.attempt += 1
        self.alive = set(places)
        self._world, self._started_at, self._waiting_for = fitted.world, now, ""
        start = Start(self.attempt, places, fitted.world, fitted.sizes)
        if self.maximum == 1:
            return [start]
        spares = [name for name in self._nodes if name not in places]
        shares = ", ".join(f"{name} {ranks}" for name, (_, ranks) in places.items())
        more = f"; spare: {', '.join(spares)}" if spares else ""
        sizes = ", ".join(f"{axis} {size}" for axis, size in fitted.sizes.items())
        smaller = f"; fewer than the run file asks for: {sizes}" if sizes and not fitted.wanted else ""
        said = f"{fitted.world} ranks on {len(places)} nodes ({shares}){more}{smaller}"
        fields = {"attempt": self.attempt, "world": fitted.world, "nodes": list(places), "spares": spares}
        return [Say("placed", said, fields), start]

    def _place(self) -> tuple[Fitted, dict[str, tuple[int, int]]] | None:
        fitted = self.fit(sum(node.slots for node in self._nodes.values()))
        if len(self._nodes) < self.minimum or fitted is None:
            return None
        order = [name for name in self._nodes if name not in self._last]
        order += [name for name in self._last if name in self._nodes]
        places, first = {}, 0
        for name in order:
            ranks = min(self._nodes[name].slots, fitted.world - first)
            if ranks:
                places[name] = (first, ranks)
            first += ranks
        return fitted, places

    def _wait(self) -> list[Action]:
        here = sum(node.slots for node in self._nodes.values())
        short = max(self.minimum - len(self._nodes), 0)
        missing = (
            f"{short} more nodes (--nodes)" if short else f"more ranks: {self.needs}, and {here} are here"
        )
        if missing == self._waiting_for:
            return []
        self._waiting_for = missing
        return [Say("waiting", f"waiting for {missing}", {"nodes": list(self._nodes), "ranks": here})]

    def _grow(self, now: float) -> list[Action]:
        """Interrupt the run for a node that allows a larger layout: it saves first, so nothing is lost."""
        if self._growing or self._cause is not None or self._preempted is not None:
            return []
        if any(now < node.joined_at + SETTLE_S for node in self._nodes.values()):
            return []
        placed = self._place()
        if placed is None or placed[0].world <= self._world:
            return []
        self._growing = True
        taken = sorted(set(placed[1]) - self.alive)
        said = f"taking in {', '.join(taken) or 'more ranks'}: the run saves, and goes on with {placed[0].world} ranks"
        return [Say("growing", said, {"nodes": taken}), *self._stop("checkpoint")]

    def _stop(self, how: Literal["kill", "checkpoint"]) -> list[Action]:
        return [Stop(tuple(sorted(self.alive)), how)] if self.alive else []

    def _end(self, exit_code: int, sentence: str) -> list[Action]:
        self.over = True
        return [End(exit_code, sentence)]


def _last_line(sentence: str) -> str:
    """The gist of a traceback: who failed, and its last line."""
    lines = [line for line in sentence.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0].split(':')[0]}: {lines[-1].strip()}"
