"""How many microbatches each schedule keeps in flight, against the lists that torch executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from muster.parallel.orders import orders
from muster.parallel.schedules import SCHEDULES, in_flight, schedule_problems
from muster.parallel.simulate import Action


def peak(actions: Sequence[Action], size: Callable[[int], int]) -> int:
    """What the microbatches come to that a rank has begun and not yet done with, at most."""
    now, most = Counter[int](), 0
    for action in actions:
        now[action.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        most = max(most, sum(count * size(stage) for stage, count in now.items()))
    return most


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stages", [2, 3])
def test_in_flight_is_what_torch_does(schedule: str, ranks: int, microbatches: int, stages: int) -> None:
    stages = stages if SCHEDULES[schedule].variable else SCHEDULES[schedule].stages_per_rank
    figures = {"ranks": ranks, "stages_per_rank": stages, "microbatches": microbatches}
    if schedule_problems(schedule, **figures, sequences=microbatches):
        pytest.skip("torch has no such schedule")
    sizes: list[Callable[[int], int]] = [lambda _: 1, lambda stage: 1 + stage, lambda stage: 20 - stage]
    for rank, actions in enumerate(orders(schedule, **figures)):
        for size in sizes:
            done = peak(actions, size)
            states = in_flight(schedule, rank, **figures)
            said = max(sum(count * size(stage) for stage, count in state.items()) for state in states)
            assert said == done if microbatches >= 2 * ranks else said >= done
