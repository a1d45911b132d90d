"""When a pipeline's operations run and how much of the ranks' time is bubble, from their durations alone.

Pure: plain data in, plain data out; no torch, no processes. Each rank runs its list in order; an operation starts
once its rank is free and what it needs has arrived. What it does not model: ranks that slow each other down, and
the same work taking longer at one time than at another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["F", "B", "I", "W"]
"""F forward, B the whole backward, or in two parts: I gradients of the inputs, W gradients of the weights."""


@dataclass(frozen=True, slots=True)
class Action:
    """One piece of work of a schedule: a stage on a microbatch."""

    stage: int
    kind: Kind
    microbatch: int


@dataclass(frozen=True, slots=True)
class Operation:
    """A piece of work that took place, or would have, on a rank."""

    rank: int
    stage: int
    kind: Kind
    microbatch: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Delays:
    """What passes besides the operations."""

    gap_s: float = 0.0
    """From the end of an operation to the start of the next on the same rank."""
    transfer_s: float = 0.0
    """From the end of an operation to the start of one on another rank that waits for its result."""
    gaps_s: Mapping[tuple[int, Kind], float] = field(default_factory=dict)
    """The gap before the operations of a stage and kind, where it is known: those that take in what another rank sent
    begin later."""

    def before_s(self, action: Action) -> float:
        return self.gaps_s.get((action.stage, action.kind), self.gap_s)


def simulate(
    actions: Sequence[Sequence[Action]], duration_s: Callable[[Action], float], delays: Delays = Delays()
) -> list[Operation]:
    """Every operation of one step with its start and end, in order of their ends on each rank.

    `actions` holds a list for each rank; `duration_s` says how long an action takes. Raises ValueError where an
    operation waits for one that never comes.
    """
    stages = 1 + max(action.stage for own in actions for action in own)
    done: dict[Action, Operation] = {}
    position, free_s = [0] * len(actions), [0.0] * len(actions)
    operations: list[Operation] = []
    while True:
        progress = False
        for rank, own in enumerate(actions):
            while position[rank] < len(own):
                action = own[position[rank]]
                needs = [_finished(need, done) for need in _needs(action, stages)]
                ready_s = [_arrival_s(need, rank, delays) for need in needs if need is not None]
                if len(ready_s) < len(needs):
                    break
                start_s = max([free_s[rank] + (delays.before_s(action) if position[rank] else 0.0), *ready_s])
                free_s[rank] = start_s + duration_s(action)
                done[action] = Operation(
                    rank, action.stage, action.kind, action.microbatch, start_s, free_s[rank]
                )
                operations.append(done[action])
                position[rank] += 1
                progress = True
        if all(at == len(own) for at, own in zip(position, actions, strict=True)):
            return operations
        if not progress:
            waiting = [own[at] for at, own in zip(position, actions, strict=True) if at < len(own)]
            raise ValueError(f"the schedule cannot go on: each of {waiting} waits for another")


def bubble_fraction(operations: Sequence[Operation]) -> float:
    """The share of the ranks' time, from the first start to the last end, in which they do nothing."""
    ranks = len({operation.rank for operation in operations})
    span_s = max(o.end_s for o in operations) - min(o.start_s for o in operations)
    busy_s = sum(o.end_s - o.start_s for o in operations)
    return 1.0 - busy_s / (ranks * span_s)


def mean_duration_s(operations: Sequence[Operation]) -> Callable[[Action], float]:
    """How long an action takes: the mean of the recorded operations of its stage and kind."""
    found: dict[tuple[int, Kind], list[float]] = {}
    for operation in operations:
        found.setdefault((operation.stage, operation.kind), []).append(operation.end_s - operation.start_s)
    means_s = {key: _mean(values) for key, values in found.items()}
    return lambda action: means_s[action.stage, action.kind]


def mean_delays(operations: Sequence[Operation]) -> Delays:
    """The mean delays in one recorded step: gaps where nothing was waited for, transfers where something was."""
    stages = 1 + max(operation.stage for operation in operations)
    done = {_action(operation): operation for operation in operations}
    gaps_s: dict[tuple[int, Kind], list[float]] = {}
    transfers_s = []
    for rank in {operation.rank for operation in operations}:
        own = sorted((o for o in operations if o.rank == rank), key=lambda o: o.start_s)
        for before, now in itertools.pairwise(own):
            needs = [_finished(need, done) for need in _needs(_action(now), stages)]
            ready_s = max((need.end_s for need in needs if need and need.rank != rank), default=-math.inf)
            if ready_s <= before.end_s:
                gaps_s.setdefault((now.stage, now.kind), []).append(now.start_s - before.end_s)
            else:
                transfers_s.append(now.start_s - ready_s)
    return Delays(
        gap_s=_mean([gap_s for found in gaps_s.values() for gap_s in found]),
        transfer_s=_mean(transfers_s),
        gaps_s={key: _mean(found) for key, found in gaps_s.items()},
    )


def _action(operation: Operation) -> Action:
    return Action(operation.stage, operation.kind, operation.microbatch)


def _needs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    """What must be done before an action: of each tuple any one."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "W":
        return [(Action(stage, "I", microbatch),)]
    if action.kind == "F":
        return [(Action(stage - 1, "F", microbatch),)] if stage else []
    needs: list[tuple[Action, ...]] = [(Action(stage, "F", microbatch),)]
    if stage < stages - 1:
        needs.append((Action(stage + 1, "B", microbatch), Action(stage + 1, "I", microbatch)))
    return needs


def _finished(alternatives: tuple[Action, ...], done: Mapping[Action, Operation]) -> Operation | None:
    return next((done[action] for action in alternatives if action in done), None)


def _arrival_s(need: Operation, rank: int, delays: Delays) -> float:
    return need.end_s + (delays.transfer_s if need.rank != rank else 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
