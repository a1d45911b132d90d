"""Who takes part in a run of replica groups, and which sums count: a state machine over plain data.

Events go in (with the time), actions come out; sockets, processes and clocks are the coordinator's business, so a
test can run thousands of simulated failures on virtual time. What it promises, whatever dies when:

- A sum (a *round*) is committed once, and only if every rank of every member said it has the result; else all drop it.
- All ranks of all members are told the same decisions in the same order, so a view (an *epoch*) is the same to all.
- One group, and only before the first view, reads the checkpoint. From then on state comes from a member that holds it:
  nobody starts over while others have committed, and where nobody holds the state any more the run is lost, not reset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muster.config.faults import Timeouts

_FAILURES_IN_A_ROW = 3
"""Failed rounds with everybody alive after which the youngest of those that could not finish has to go."""

_WORD_OF_DEATH_S = 0.5
"""The end of a process is known that soon."""


@dataclass(frozen=True, slots=True)
class View:
    """Who takes part from here on."""

    epoch: int
    round: int
    """Number of the round that comes next."""
    members: tuple[int, ...]
    """Groups, the longest member first: it leads."""
    sources: Mapping[int, int]
    """For each member without state, the one to take it from."""


@dataclass(frozen=True, slots=True)
class Load:
    """To a group: read the checkpoint."""

    group: int


@dataclass(frozen=True, slots=True)
class Decide:
    """To every member of the view: what became of the last round, and who takes part in the next."""

    committed: bool
    view: View


@dataclass(frozen=True, slots=True)
class Committed:
    """For the ledger: the notes that came with the votes, by group and rank."""

    epoch: int
    round: int
    notes: Mapping[tuple[int, int], Any]


@dataclass(frozen=True, slots=True)
class Fence:
    """Put an end to a group that no longer takes part."""

    group: int
    why: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The run cannot go on from memory."""

    why: str


Action = Load | Decide | Committed | Fence | Lost


@dataclass(frozen=True, slots=True)
class Vote:
    epoch: int
    round: int
    ok: bool
    note: Any = None
    last: bool = False
    """The run ends when this round is committed."""


class Membership:
    def __init__(self, groups: int, ranks: int, timeouts: Timeouts, now: float) -> None:
        """`groups` of `ranks` ranks each are expected."""
        self._groups, self._ranks, self._timeouts = groups, ranks, timeouts
        self.view: View | None = None
        self.done = False
        self.lost = False
        self._arrived: dict[int, set[int]] = {}
        self._waiting: list[int] = []
        self._loader: int | None = None
        self._loaded: set[int] = set()
        self._without_state: set[int] = set()
        self._received: set[tuple[int, int]] = set()
        self._votes: dict[tuple[int, int], Vote] = {}
        self._failures = 0
        self._begun = self._progress = now
        self._votes_due: float | None = None
        self._declined: tuple[float, int] | None = None

    @property
    def waiting(self) -> tuple[int, ...]:
        """Groups that are ready to join."""
        return tuple(self._waiting)

    def hello(self, now: float, group: int, rank: int) -> list[Action]:
        """A rank is ready to take part; its group is, when all its ranks are."""
        ranks = self._arrived.setdefault(group, set())
        ranks.add(rank)
        if len(ranks) < self._ranks or self.done:
            return []
        self._waiting.append(group)
        return [] if self.view else [*self._choose_loader(), *self._form(now)]

    def loaded(self, now: float, group: int, rank: int) -> list[Action]:
        """A rank has what the checkpoint holds, or the state of a new run where there is none."""
        if group == self._loader:
            self._loaded.add(rank)
        return self._form(now)

    def holds(self, group: int, rank: int, epoch: int) -> list[Action]:
        """A rank of a newcomer has the state."""
        if self.view is not None and epoch == self.view.epoch and group in self._without_state:
            self._received.add((group, rank))
            if all((group, each) in self._received for each in range(self._ranks)):
                self._without_state.remove(group)
        return []

    def vote(self, now: float, group: int, rank: int, vote: Vote) -> list[Action]:
        """A rank has its part of a round's result, or could not get it."""
        view = self.view
        if view is None or self.done or self.lost or group not in view.members:
            return []
        if (vote.epoch, vote.round) != (view.epoch, view.round):
            return []  # of a round that was dropped in the meantime
        if not self._votes:
            self._votes_due = now + self._timeouts.vote
        self._votes[group, rank] = vote
        if not vote.ok and group in self._without_state:
            # Nobody can finish this round. If the source is dead, word of that is under way, and names the culprit.
            self._declined = now + _WORD_OF_DEATH_S, group
            return []
        if len(self._votes) < len(view.members) * self._ranks:
            return []
        failed = [member for member in view.members if self._failed(member)]
        return self._commit(now, view) if not failed else self._drop(view, failed)

    def gone(self, now: float, group: int) -> list[Action]:
        """A rank of the group has ended, or cannot be reached: the group is no more."""
        self._arrived.pop(group, None)
        if group in self._waiting:
            self._waiting.remove(group)
        if self.done or self.lost:
            return []
        if self.view is None:
            if group == self._loader:
                self._loader = None
                self._loaded.clear()
            return [*self._choose_loader(), *self._form(now)]
        if group in self.view.members:
            return self._regroup(self.view, {group})
        return []

    def given_up(self, now: float) -> list[Action]:
        """A group that is not here will not come (again): one less to wait for at the start."""
        self._groups -= 1
        return [] if self.done or self.lost else self._form(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        view = self.view
        if self.done or self.lost:
            return []
        if now - self._progress >= self._timeouts.supervisor:
            return self._lose(f"no step was committed for {self._timeouts.supervisor:g} s")
        if view is None:
            return self._form(now)
        if self._declined is not None and now >= self._declined[0]:
            return self._drop(view, [self._declined[1]])
        if self._votes_due is None or now < self._votes_due:
            return []
        silent = {m for m in view.members if any((m, rank) not in self._votes for rank in range(self._ranks))}
        for group in silent:
            self._arrived.pop(group, None)
        why = f"did not vote on round {view.round} within {self._timeouts.vote:g} s of the first"
        return [*(Fence(group, why) for group in sorted(silent)), *self._regroup(view, silent)]

    def due(self) -> float | None:
        """When `tick` should be called at the latest."""
        if self.done or self.lost:
            return None
        times = [self._progress + self._timeouts.supervisor]
        if self.view is None and self._is_loaded():
            times.append(self._begun + self._timeouts.quorum)
        if self._votes_due is not None:
            times.append(self._votes_due)
        if self._declined is not None:
            times.append(self._declined[0])
        return min(times)

    def _choose_loader(self) -> list[Action]:
        if self._loader is not None or not self._waiting:
            return []
        self._loader = self._waiting[0]
        return [Load(self._loader)]

    def _is_loaded(self) -> bool:
        return self._loader is not None and len(self._loaded) == self._ranks

    def _form(self, now: float) -> list[Action]:
        """The first view, when all are there or those that are have waited long enough."""
        full = len(self._waiting) >= self._groups or now >= self._begun + self._timeouts.quorum
        if self.view is not None or not self._is_loaded() or not full or self.lost:
            return []
        assert self._loader is not None
        others = [group for group in self._waiting if group != self._loader]
        self._waiting = []
        self._without_state = set(others)
        return self._enter(View(1, 0, (self._loader, *others), dict.fromkeys(others, self._loader)), False)

    def _commit(self, now: float, view: View) -> list[Action]:
        """Groups that wait join here: at this moment every member has the same state."""
        notes = {who: vote.note for who, vote in self._votes.items()}
        self.done = all(vote.last for vote in self._votes.values())
        self._progress, self._failures, self._without_state = now, 0, set()
        ledger = Committed(view.epoch, view.round, notes)
        joining = [] if self.done else self._waiting
        sources = {group: view.members[i % len(view.members)] for i, group in enumerate(joining)}
        after = View(view.epoch + bool(joining), view.round + 1, (*view.members, *joining), sources)
        if joining:
            self._waiting, self._without_state = [], set(joining)
        return [ledger, *self._enter(after, True)]

    def _drop(self, view: View, failed: list[int]) -> list[Action]:
        self._failures += 1
        if self._failures < _FAILURES_IN_A_ROW or len(view.members) == 1:
            return self._regroup(view, set())
        self._failures = 0
        self._arrived.pop(failed[-1], None)
        why = f"could not finish {_FAILURES_IN_A_ROW} rounds in a row with the others"
        return [Fence(failed[-1], why), *self._regroup(view, {failed[-1]})]

    def _regroup(self, view: View, without: set[int]) -> list[Action]:
        """The same round again, in a new epoch."""
        members = tuple(member for member in view.members if member not in without)
        self._without_state &= set(members)
        holders = [member for member in members if member not in self._without_state]
        if not holders:
            return self._lose("no group is left that holds the state")
        needy = [member for member in members if member in self._without_state]
        sources = {member: holders[i % len(holders)] for i, member in enumerate(needy)}
        return self._enter(View(view.epoch + 1, view.round, members, sources), False)

    def _enter(self, view: View, committed: bool) -> list[Action]:
        self.view, self._votes, self._votes_due = view, {}, None
        self._received, self._declined = set(), None
        return [Decide(committed, view)]

    def _lose(self, why: str) -> list[Action]:
        self.lost = True
        return [Lost(why)]

    def _failed(self, group: int) -> bool:
        return not all(self._votes[group, rank].ok for rank in range(self._ranks))
