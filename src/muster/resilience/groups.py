"""Replica groups as processes: started, ended as a whole when one rank ends, and started again while the others train.

Each group is a world of its own, with a rendezvous and a watchdog of its own. The coordinator of their sums, which is
served here, decides who takes part; this module makes its word come true, and keeps count of what it costs:

- A group that ends is started again, within a budget that each stretch of committed steps makes whole. A group
  that has used it is given up, and the others go on.
- Where no group is left that holds the state, all are started again from the newest checkpoint, within the budget
  that a run without groups has.
- Asked to stop, the ranks are; they agree on a step, and the leading group saves it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from muster.config.faults import Timeouts
from muster.errors import Preempted
from muster.observe import room, term
from muster.observe.records import RunLog
from muster.parallel.world import usable_cores
from muster.resilience.agent import Job, RankFailed
from muster.resilience.asked import Asked
from muster.resilience.between import COORDINATOR, GROUP, STORE, TOKEN
from muster.resilience.budget import Budget, Failure
from muster.resilience.ledger import Ledger
from muster.resilience.lifeline import INTERRUPTED
from muster.resilience.membership import Action, Committed, Decide, Fence, Lost
from muster.resilience.membership_server import Coordinator
from muster.resilience.ranks import Forks, Place, Ranks

_POLL_S = 0.05
_CAUSE_WAIT_S = 1.0
"""How long a rank that only lost its peer waits for the peer to be seen dead."""
_LAST_WORDS_S = 5.0
"""How long a run that is lost waits to learn why its groups ended: a watchdog may be taking it down."""
_HEADWAY_STEPS = 10
"""A group that has committed so many steps since it was started has its budget made whole."""
_AGAIN = "run the same command again to resume from the newest checkpoint"


def start_groups(
    job: Job,
    groups: int,
    ranks: int,
    timeouts: Timeouts,
    zygote: Forks,
    say: Callable[[str], None] | None = None,
) -> None:
    """Train as `groups` groups of `ranks` ranks until the run is done. RankFailed with what ended it, or Preempted.

    The groups' first ranks write to this terminal (that of the group that leads does), the others to a folder of their
    group in `logs/`.
    """
    say = say or room.say
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    budget, asked, log = Budget(restarts=job.restarts), Asked(), RunLog(job.folder)
    try:
        with asked.listens():
            while True:
                life = _Life(job, groups, ranks, timeouts, zygote, asked, log, say)
                try:
                    failure = life.run()
                finally:
                    life.close()
                if failure is None:
                    return
                _restart_or_raise(failure, budget, job, asked, log, say)
    finally:
        log.close()


def _restart_or_raise(
    failure: Failure, budget: Budget, job: Job, asked: Asked, log: RunLog, say: Callable[[str], None]
) -> None:
    """Wait for the time to start all groups again, if there is to be one."""
    last = failure.sentence.strip().splitlines()[-1]
    if asked.signal:
        raise Preempted(f"stopped by {asked.signal} without a checkpoint ({last}): {_AGAIN}")
    verdict = budget.failed(failure, job.committed())
    if verdict.delay_s is None:
        log.event("gave-up", message=verdict.why, error=failure.sentence)
        raise RankFailed(
            f"{verdict.why}\n{failure.sentence}" if verdict.why else failure.sentence, failure.exit_code
        )
    said = f"{last}; {verdict.why} of all groups, from the checkpoint of step {job.committed()}"
    log.event("restart", message=said, error=failure.sentence, delay_s=verdict.delay_s)
    say(said)
    until = time.monotonic() + verdict.delay_s
    while time.monotonic() < until and not asked.signal:
        time.sleep(_POLL_S)


@dataclass(kw_only=True)
class _Group:
    index: int
    budget: Budget
    ranks: Ranks | None = None
    store: Any = None
    lives: int = 0
    steps: int = 0
    """Committed ones that it took part in since it was started."""
    headway: int = 0
    """Lives in which there were enough of them."""
    not_before: float | None = 0.0
    """When it may be started; None where it is given up."""
    failed_at: float | None = None
    fenced: str = ""
    """Why it has to end, where others say so."""
    asked: bool = field(default=False)
    term: str = ""
    """By which these ranks may commit checkpoints, when this group leads."""

    def __str__(self) -> str:
        return f"group {self.index}"


class _Life:
    """From the start of all groups to the end of the run, or of the last group that holds its state."""

    def __init__(
        self,
        job: Job,
        groups: int,
        ranks: int,
        timeouts: Timeouts,
        forks: Forks,
        asked: Asked,
        log: RunLog,
        say: Callable[[str], None],
    ) -> None:
        self._job, self._ranks, self._forks, self._asked = job, ranks, forks, asked
        self._log, self._say, self._term = log, say, ""
        headway = f"{_HEADWAY_STEPS} steps in a row"
        self._groups = [
            _Group(index=index, budget=Budget(restarts=job.restarts, headway=headway))
            for index in range(groups)
        ]
        self._coordinator = Coordinator(groups, ranks, timeouts, self._handle)
        self._store, self._ledger = _store(), Ledger(job.folder)
        self._failures: list[Failure] = []
        """Since the last committed step, in the order in which they were found."""
        self._lost: tuple[str, float] | None = None
        self._deadline: float | None = None
        """When ranks that were asked to stop, or are done, are killed."""

    def run(self) -> Failure | None:
        """None when the run is done. Preempted, or RankFailed, where it is to end otherwise."""
        while not self._is_over():
            self._heed()
            self._forks.read(wait=False)
            for group in self._groups:
                self._tend(group)
            if self._lost is not None and self._knows_why(self._lost[1]):
                return self._failure(self._lost[0])
            self._coordinator.serve(_POLL_S)
        said = [group.ranks.preempted() for group in self._leader_first() if group.ranks is not None]
        if stopped := next(filter(None, said), None):
            raise Preempted(stopped)
        return None

    def close(self) -> None:
        for group in self._groups:
            if group.ranks is not None:
                group.ranks.kill()
        for group in self._groups:
            if group.ranks is not None:
                while not group.ranks.over:
                    self._forks.read()
                group.ranks.close()
        self._coordinator.close()
        self._ledger.close()

    def _is_over(self) -> bool:
        """The last round is committed and its members have left; who else waits is no longer needed."""
        if not self._coordinator.membership.done:
            return False
        now = time.monotonic()
        self._deadline = self._deadline or now + self._job.grace_s
        return now >= self._deadline or all(g.ranks is None or g.ranks.over for g in self._leader_first())

    def _leader_first(self) -> list[_Group]:
        view = self._coordinator.membership.view
        return [self._groups[member] for member in view.members] if view is not None else []

    def _heed(self) -> None:
        """Do what signals ask: have the ranks save and leave, or end everything."""
        asked = self._asked
        if asked.at_once:
            raise RankFailed(f"stopped at once, without a checkpoint: {_AGAIN}", INTERRUPTED)
        if asked.signal is None:
            return
        if self._coordinator.membership.view is None:
            raise Preempted(f"stopped by {asked.signal} before the groups had met: {_AGAIN}")
        self._deadline = self._deadline or time.monotonic() + self._job.grace_s
        if time.monotonic() >= self._deadline and not self._coordinator.membership.done:
            raise Preempted(
                f"stopped by {asked.signal}, but the groups did not save within {self._job.grace_s:g} s "
                f"(faults.grace) and were killed: {_AGAIN}"
            )
        for group in self._groups:
            if group.ranks is not None and not group.asked:
                group.asked = True
                group.ranks.signal(signal.SIGTERM)

    def _tend(self, group: _Group) -> None:
        """Start a group that is down, and end one that has lost a rank."""
        ranks, now = group.ranks, time.monotonic()
        leaves = self._asked.signal is not None or self._lost is not None or self._coordinator.membership.done
        if ranks is None:
            if not leaves and group.not_before is not None and now >= group.not_before:
                self._launch(group)
            return
        failure = ranks.failure()
        if ranks.over:
            if not self._coordinator.membership.done:
                self._bury(group, failure)
        elif failure is not None:
            group.failed_at = group.failed_at or now
            if not failure.consequence or now >= group.failed_at + _CAUSE_WAIT_S:
                ranks.kill()

    def _launch(self, group: _Group) -> None:
        group.store, group.term = _store(), term.new()  # the group's own rendezvous
        place = Place(
            first=0,
            ranks=self._ranks,
            world=self._ranks,
            host="127.0.0.1",
            port=group.store.port,
            attempt=group.lives,
            name=str(group),
            term=group.term,
        )
        group.ranks = Ranks(
            zygote=self._forks,
            argv=self._job.argv,
            place=place,
            logs=self._job.folder / "logs" / str(group).replace(" ", "-"),
            watchdog=None if self._job.watch is None else self._job.watch(place),
            environment={rank: self._environment(group, rank) for rank in range(self._ranks)},
        )
        group.lives, group.steps, group.failed_at, group.fenced = group.lives + 1, 0, None, ""
        while None in group.ranks.pids:
            self._forks.read()
        self._log.event("group-started", group=group.index, pids=group.ranks.pids)

    def _environment(self, group: _Group, rank: int) -> dict[str, str]:
        here = len(self._groups) * self._ranks
        return {
            # Which device, and how many share the machine.
            "LOCAL_RANK": str(group.index * self._ranks + rank),
            "LOCAL_WORLD_SIZE": str(here),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(usable_cores() // here, 1)),
            COORDINATOR: self._coordinator.address,
            TOKEN: self._coordinator.token,
            STORE: f"127.0.0.1:{self._store.port}",
            GROUP: str(group.index),
        }

    def _handle(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Committed):
                self._count(action)
            elif isinstance(action, Fence):
                self._fence(self._groups[action.group], action.why)
            elif isinstance(action, Lost):
                self._lose(action.why)
            elif isinstance(action, Decide):
                self._let_commit(self._groups[action.view.members[0]])
                if action.view.sources or not action.committed:
                    self._tell(action)

    def _count(self, committed: Committed) -> None:
        if wrong := self._ledger.write(committed):
            self._lose(wrong)
        self._failures.clear()
        for index in {index for index, _ in committed.notes}:
            self._groups[index].steps += 1

    def _let_commit(self, leader: _Group) -> None:
        """Before any rank hears who leads: the one before may be cut off, and not know."""
        if leader.term != self._term:
            self._term = leader.term
            term.grant(self._job.folder, leader.term)

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

    def _fence(self, group: _Group, why: str) -> None:
        """End a group that holds the others up, and learn what it was doing."""
        if group.ranks is None:
            return
        group.fenced = why
        if group.ranks.watchdog is not None:
            group.ranks.watchdog.accuse()
        else:
            group.ranks.kill()

    def _bury(self, group: _Group, failure: Failure | None) -> None:
        """All ranks of a group have ended: say why, and set the time of its return."""
        assert group.ranks is not None
        said = failure.sentence if failure is not None else "ended by nobody's order"
        why = f"{group} {group.fenced}: {said}" if group.fenced else f"{group}, {said}"
        failure = replace(failure or Failure(sentence=why), sentence=why)
        group.ranks.close()
        group.ranks = group.store = None
        self._coordinator.gone(group.index)
        self._failures.append(failure)
        group.headway += group.steps >= _HEADWAY_STEPS
        verdict = group.budget.failed(failure, group.headway)
        given_up = verdict.delay_s is None
        group.not_before = None if verdict.delay_s is None else time.monotonic() + verdict.delay_s
        self._log.event("group-ended", message=why, group=group.index, again_in_s=verdict.delay_s)
        last = why.strip().splitlines()[-1]
        last = last if last.startswith(str(group)) else f"{group}, {last}"
        if given_up:
            last = f"{last}; {group} is not started again{f': {verdict.why}' if verdict.why else ''}"
            self._log.event("group-given-up", message=last, group=group.index)
            self._coordinator.given_up()
        self._say(last)
        if all(each.not_before is None and each.ranks is None for each in self._groups):
            self._lose("no group is left")

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = why, time.monotonic()

    def _knows_why(self, since: float) -> bool:
        """Whether a group's own failure is known, or would be by now."""
        return any(not failure.consequence for failure in self._failures) or (
            time.monotonic() >= since + _LAST_WORDS_S or all(group.ranks is None for group in self._groups)
        )

    def _failure(self, why: str) -> Failure:
        """What explains best that the run is lost: the first that failed by itself."""
        if not self._failures:
            return Failure(sentence=why)
        first = min(self._failures, key=lambda failure: failure.consequence)
        return replace(first, sentence=f"{why}: {first.sentence}")


def _store() -> Any:
    """A rendezvous on a port that the system chooses."""
    import torch.distributed as dist

    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
