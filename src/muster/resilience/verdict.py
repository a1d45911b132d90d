"""Who did it: from what is known of every rank to the one that the others wait for, or that ended them. Pure.

In the order in which evidence is conclusive: a rank that failed by itself; ranks that called another collective than
the rest; one that was ended, or is stopped; a rank that others wait for and that waits for nobody.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muster.resilience.evidence import Collective, Witness

Cause = Literal["failed", "killed", "stopped", "mismatch", "absent", "deadlock", "elsewhere", "unknown"]
_LONGEST_PATTERN = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The culprits, which may be several or none, and one sentence that says why."""

    ranks: tuple[int, ...]
    cause: Cause
    sentence: str
    exit_code: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """`rank` is in `collective`, which `on` have not come to."""

    rank: int
    collective: Collective
    on: tuple[int, ...]


def judge(witnesses: Sequence[Witness]) -> Verdict:
    """The verdict on ranks that make no progress, or of which some have ended."""
    for find in (_failed, _mismatched, _killed, _stopped, _absent):
        verdict = find(witnesses)
        if verdict is not None:
            return verdict
    return _unknown(witnesses)


def waits(witnesses: Sequence[Witness]) -> list[Wait]:
    """Who waits for whom, by the collectives that were begun and those that others have come to."""
    reached = {
        (witness.rank, entry.group): entry.number
        for witness in witnesses
        for entry in witness.collectives or ()
    }
    known = {witness.rank for witness in witnesses}
    found = []
    for witness in witnesses:
        entry = witness.pending
        if entry is None or not witness.waiting:
            continue
        members = [rank for rank in _members(witnesses, entry.group) if rank in known]
        on = tuple(rank for rank in members if reached.get((rank, entry.group), 0) < entry.number)
        found.append(Wait(rank=witness.rank, collective=entry, on=on))
    return found


def doing(witness: Witness) -> str:
    """`backward of step 7 for 3 s, in loader.py:12 in read`."""
    step = f" of step {witness.step}" if witness.step else ""
    where = f", in {witness.where}" if witness.where else ""
    return f"{witness.phase}{step} for {witness.in_phase_s:.0f} s{where}"


def _failed(witnesses: Sequence[Witness]) -> Verdict | None:
    own = [w for w in witnesses if w.failure and w.failure.exit_code >= 0 and not w.failure.follows]
    own = [w for w in own if w.failure and not w.failure.crash]
    if not own:
        return None
    first = own[0]
    assert first.failure is not None
    who, message = f"rank {first.rank}", first.failure.message.strip()
    return Verdict(
        ranks=tuple(w.rank for w in own),
        cause="failed",
        sentence=message if message.startswith(who) else f"{who}: {message}",
        exit_code=first.failure.exit_code or 1,
    )


def _killed(witnesses: Sequence[Witness]) -> Verdict | None:
    ended = [w for w in witnesses if w.failure and w.failure.exit_code < 0]
    ended = ended or [w for w in witnesses if w.failure and w.failure.crash]
    if not ended:
        return None
    first = ended[0]
    assert first.failure is not None
    name = signal.Signals(-first.failure.exit_code).name if first.failure.exit_code < 0 else "SIGABRT"
    doing_what = f" in {doing(first)}" if first.step or first.where else ""
    return Verdict(
        ranks=tuple(w.rank for w in ended),
        cause="killed",
        sentence=f"{_names(ended)} killed by {name}{doing_what}",
    )


def _stopped(witnesses: Sequence[Witness]) -> Verdict | None:
    stopped = [w for w in witnesses if w.stopped]
    if not stopped:
        return None
    return Verdict(
        ranks=tuple(w.rank for w in stopped),
        cause="stopped",
        sentence=f"{_names(stopped)} stopped (process state {stopped[0].process}, by SIGSTOP or a debugger) in "
        f"{doing(stopped[0])}{_waiting_for([w.rank for w in stopped], witnesses)}",
    )


def _mismatched(witnesses: Sequence[Witness]) -> Verdict | None:
    """Ranks whose n-th collective in a group is another one than the rest's: the first such n of any group."""
    tails = {w.rank: _by_number(w) for w in witnesses}
    groups = sorted({group for tail in tails.values() for group in tail})
    for group in groups:
        members = {rank: tail[group] for rank, tail in tails.items() if group in tail}
        for number in sorted({number for tail in members.values() for number in tail}):
            calls = {rank: tail[number] for rank, tail in members.items() if number in tail}
            if len({call.signature for call in calls.values()}) > 1:
                return _odd_ones(witnesses, number, calls, members)
    return None


def _odd_ones(
    witnesses: Sequence[Witness],
    number: int,
    calls: dict[int, Collective],
    members: dict[int, dict[int, Collective]],
) -> Verdict:
    counted = Counter(call.signature for call in calls.values()).most_common()
    history = [
        call.signature for n, call in sorted(members[next(iter(calls))].items()) if n < number
    ]  # the same on all
    usual: Any = counted[0][0]
    sure = counted[0][1] > counted[1][1]
    if not sure:
        # As many against as many: what came at this place before tells who is odd.
        expected = expected_next(history)
        if expected in [signature for signature, _ in counted]:
            usual, sure = expected, True
    odd = sorted(rank for rank, call in calls.items() if not sure or call.signature != usual)
    by_rank = {w.rank: w for w in witnesses}
    if not sure:
        said = ", ".join(f"rank {rank} called {call}" for rank, call in sorted(calls.items()))
        return Verdict(
            ranks=tuple(odd),
            cause="mismatch",
            sentence=f"the ranks disagree on collective #{number}: {said}; "
            f"rank {odd[0]} is in {doing(by_rank[odd[0]])}",
        )
    rest = [rank for rank, call in calls.items() if call.signature == usual]
    skipped = expected_next([*history, usual]) == calls[odd[0]].signature
    return Verdict(
        ranks=tuple(odd),
        cause="mismatch",
        sentence=f"{_names([by_rank[rank] for rank in odd], '')} called {calls[odd[0]]} as collective #{number}, where "
        f"{_names([by_rank[rank] for rank in rest], '')} called {calls[rest[0]]}"
        f"{', as if it had skipped that one' if skipped else ''}; it is in {doing(by_rank[odd[0]])}",
    )


def _absent(witnesses: Sequence[Witness]) -> Verdict | None:
    """Ranks that others wait for, directly or by way of others, and that wait for nobody."""
    edges = waits(witnesses)
    wanted = {rank for wait in edges for rank in wait.on}
    by_rank = {w.rank: w for w in witnesses}
    blocked = {wait.rank for wait in edges if wait.on}
    guilty = sorted(rank for rank in wanted if rank not in blocked)
    if not guilty and wanted:
        return _deadlocked([wait for wait in edges if wait.on], witnesses)
    if not guilty:  # older versions of torch record nothing on gloo
        idle = [w for w in witnesses if not w.waiting and w.process not in ("", "Z")]
        guilty = [w.rank for w in idle] if len(idle) < len(witnesses) or len(witnesses) == 1 else []
    if not guilty:
        return None
    first = by_rank[guilty[0]]
    silent = ", and its interpreter does not answer" if first.collectives is None else ""
    disk = ", waiting for a disk or a file system (process state D)" if first.process == "D" else ""
    gone = " has gone" if first.process in ("", "Z") else f" is stuck in {doing(first)}{disk}{silent}"
    return Verdict(
        ranks=tuple(guilty),
        cause="absent",
        sentence=f"{_names([by_rank[rank] for rank in guilty], '')}{gone}{_waiting_for(guilty, witnesses)}",
    )


def _deadlocked(edges: Sequence[Wait], witnesses: Sequence[Witness]) -> Verdict:
    """Ranks that wait for each other, in calls that do not belong together.

    The one to blame does what it has not done before at that place; else what most of the others do not do.
    """
    by_rank = {w.rank: w for w in witnesses}
    ranks = sorted(wait.rank for wait in edges)
    kinds = Counter(wait.collective.operation for wait in edges).most_common()
    odd = [rank for rank in ranks if _unusual(by_rank[rank])]
    if (not odd or len(odd) == len(ranks)) and len(kinds) > 1 and kinds[0][1] > kinds[1][1]:
        odd = sorted(wait.rank for wait in edges if wait.collective.operation != kinds[0][0])
    said = "; ".join(
        f"rank {w.rank} in {w.collective} #{w.collective.number} for {_ranks(w.on)}" for w in edges
    )
    if odd and len(odd) < len(ranks):
        return Verdict(
            ranks=tuple(odd),
            cause="mismatch",
            sentence=f"{_ranks(odd)} made another call than the rest, and all wait for each other: {said}; "
            f"rank {odd[0]} is in {doing(by_rank[odd[0]])}",
        )
    return Verdict(
        ranks=tuple(ranks), cause="deadlock", sentence=f"{_ranks(ranks)} wait for each other: {said}"
    )


def _unusual(witness: Witness) -> bool:
    """Whether the first call that it has not finished is another one than came at this place before."""
    calls = witness.collectives or ()
    first = next((index for index, call in enumerate(calls) if not call.done), None)
    if first is None:
        return False
    history = [(call.group, *call.signature) for call in calls[:first]]
    expected = expected_next(history)
    return expected is not None and expected != (calls[first].group, *calls[first].signature)


def _unknown(witnesses: Sequence[Witness]) -> Verdict:
    if any(w.failure for w in witnesses):
        first = next(w for w in witnesses if w.failure)
        assert first.failure is not None
        return Verdict(
            ranks=(),
            cause="unknown",
            sentence=f"rank {first.rank} lost its connection to another rank: {first.failure.last_line}",
        )
    edges = waits(witnesses)
    where = f"in {edges[0].collective} #{edges[0].collective.number}" if edges else "for messages"
    known = {w.rank for w in witnesses}
    remote = sorted({r for wait in edges for r in _members(witnesses, wait.collective.group)} - known)
    if remote:
        return Verdict(
            ranks=(),
            cause="elsewhere",
            sentence=f"{_ranks(sorted(known))} wait {where}, for {_ranks(remote)} on other nodes",
        )
    return Verdict(
        ranks=(),
        cause="unknown",
        sentence=f"all {len(witnesses)} ranks wait {where} and each has come to it: the network does not move",
    )


def expected_next(history: Sequence[Any]) -> Any:
    """What followed the last time that the longest possible run of calls before now was seen; None if never."""
    for length in range(min(_LONGEST_PATTERN, len(history) - 1), 0, -1):
        pattern = list(history[-length:])
        for end in range(len(history) - 1, length - 1, -1):
            if list(history[end - length : end]) == pattern:
                return history[end]
    return None


def _by_number(witness: Witness) -> dict[str, dict[int, Collective]]:
    found: dict[str, dict[int, Collective]] = {}
    for call in witness.collectives or ():
        found.setdefault(call.group, {})[call.number] = call
    return found


def _members(witnesses: Sequence[Witness], group: str) -> list[int]:
    if ">" in group:
        return sorted(int(rank) for rank in group.split(":")[1].split(">"))
    said = {rank for w in witnesses for rank in w.groups.get(group, ())}
    return sorted(said or {w.rank for w in witnesses if any(c.group == group for c in w.collectives or ())})


def _waiting_for(guilty: Sequence[int], witnesses: Sequence[Witness]) -> str:
    edges = [wait for wait in waits(witnesses) if set(wait.on) & set(guilty)]
    if not edges:
        return ""
    call = edges[0].collective
    who = [wait.rank for wait in edges]
    return f"; {_ranks(who)} {'waits' if len(who) == 1 else 'wait'} for it in {call} #{call.number}"


def _names(witnesses: Sequence[Witness], verb: str = "was") -> str:
    ranks = [w.rank for w in witnesses]
    verb = {"was": " was" if len(ranks) == 1 else " were"}.get(verb, "")
    return f"{_ranks(ranks)}{verb}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_numbers(ranks)}"


def _numbers(ranks: Sequence[int]) -> str:
    ranks = sorted(ranks)
    if len(ranks) > 6:
        return f"{', '.join(map(str, ranks[:5]))} and {len(ranks) - 5} more"
    *most, last = map(str, ranks)
    return f"{', '.join(most)} and {last}" if most else last
