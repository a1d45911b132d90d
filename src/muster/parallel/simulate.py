"""When a pipeline's operations run and how much of the ranks' time is bubble, from their durations alone.

Pure: plain data in, plain data out; no torch, no processes. Each rank runs its list in order; an operation starts
once its rank is free and what it needs has been computed. What it does not model: anything between two
operations other than a fixed transfer time, and ranks that slow each other down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def simulate(
    actions: Sequence[Sequence[Action]],
    durations_s: Mapping[tuple[int, Kind], float],
    *,
    transfer_s: float = 0.0,
) -> list[Operation]:
    """Every operation of one step with its start and end, in order of their ends on each rank.

    `actions` holds a list for each rank; `durations_s` how long a stage takes for a kind of work; `transfer_s` how
    long an activation or a gradient is on its way to another rank. Raises ValueError where an operation waits for
    one that never comes.
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
                ready_s = [_arrival_s(need, rank, transfer_s) for need in needs if need is not None]
                if len(ready_s) < len(needs):
                    break
                start_s = max([free_s[rank], *ready_s])
                free_s[rank] = start_s + durations_s[action.stage, action.kind]
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


def mean_durations_s(operations: Sequence[Operation]) -> dict[tuple[int, Kind], float]:
    """The mean duration of each (stage, kind) that was recorded."""
    found: dict[tuple[int, Kind], list[float]] = {}
    for operation in operations:
        found.setdefault((operation.stage, operation.kind), []).append(operation.end_s - operation.start_s)
    return {key: sum(values) / len(values) for key, values in found.items()}


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


def _arrival_s(need: Operation, rank: int, transfer_s: float) -> float:
    return need.end_s + (transfer_s if need.rank != rank else 0.0)
