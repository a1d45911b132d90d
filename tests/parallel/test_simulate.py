"""The simulator against bubbles that are known in closed form, and by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from muster.parallel.orders import orders
from muster.parallel.schedules import SCHEDULES
from muster.parallel.simulate import (
    Action,
    Delays,
    Operation,
    bubble_fraction,
    mean_delays,
    mean_duration_s,
    simulate,
)


def durations(**seconds: float) -> Callable[[Action], float]:
    return lambda action: seconds[action.kind]


def bubble(schedule: str, ranks: int, microbatches: int, stages_per_rank: int = 1, **seconds: float) -> float:
    plan = orders(schedule, ranks=ranks, stages_per_rank=stages_per_rank, microbatches=microbatches)
    return bubble_fraction(simulate(plan, durations(**seconds)))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 8), (4, 4), (4, 12), (8, 16)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b(schedule: str, ranks: int, microbatches: int) -> None:
    expected = (ranks - 1) / (microbatches + ranks - 1)
    assert bubble(schedule, ranks, microbatches, F=1.0, B=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "microbatches", "turns"), [(2, 4, 2), (4, 8, 2), (4, 8, 3), (8, 16, 2)])
def test_interleaving_divides_the_bubble(ranks: int, microbatches: int, turns: int) -> None:
    expected = (ranks - 1) / (turns * microbatches + ranks - 1)
    assert bubble("interleaved", ranks, microbatches, turns, F=1.0, B=2.0) == pytest.approx(expected)


def test_zbv_has_almost_no_bubble_when_its_three_parts_take_equally_long() -> None:
    # Only the way in to the last rank is idle: (p - 1) forward passes of its 6 n on each rank (Qi et al. 2023).
    assert bubble("zbv", 4, 16, 2, F=1.0, I=1.0, W=1.0) == pytest.approx(3 / (6 * 16 + 3))
    assert bubble("zbv", 4, 16, 2, F=1.0, I=1.0, W=1.0) < bubble("1f1b", 4, 16, F=2.0, B=4.0) / 5


def test_by_hand() -> None:
    """Two ranks, two microbatches, a slow second stage, half a second between ranks, a quarter between operations."""
    seconds: dict[tuple[int, str], float] = {(0, "F"): 1, (0, "B"): 2, (1, "F"): 3, (1, "B"): 4}
    plan = orders("1f1b", ranks=2, stages_per_rank=1, microbatches=2)
    done = {
        (o.stage, o.kind, o.microbatch): (o.start_s, o.end_s)
        for o in simulate(plan, lambda a: seconds[a.stage, a.kind], Delays(gap_s=0.25, transfer_s=0.5))
    }
    assert done == {
        (0, "F", 0): (0, 1),
        (0, "F", 1): (1.25, 2.25),
        (1, "F", 0): (1.5, 4.5),
        (1, "B", 0): (4.75, 8.75),
        (0, "B", 0): (9.25, 11.25),
        (1, "F", 1): (9, 12),
        (1, "B", 1): (12.25, 16.25),
        (0, "B", 1): (16.75, 18.75),
    }


def test_weights_need_no_other_rank() -> None:
    plan = [[Action(0, "F", 0), Action(0, "I", 0), Action(0, "W", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    done = simulate(plan, durations(F=1.0, B=2.0, I=1.0, W=1.0))
    assert max(o.end_s for o in done) == 6.0
    assert bubble_fraction(done) == pytest.approx(1 - 6 / 12)


def test_a_plan_that_cannot_go_on_is_refused() -> None:
    with pytest.raises(ValueError, match="waits for another"):
        simulate(
            [[Action(0, "F", 0), Action(0, "B", 0)], [Action(1, "B", 0), Action(1, "F", 0)]],
            durations(F=1, B=1),
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_delays_are_found_again_in_what_was_recorded(schedule: str) -> None:
    stages_per_rank = SCHEDULES[schedule].stages_per_rank
    plan = orders(schedule, ranks=4, stages_per_rank=stages_per_rank, microbatches=8)
    delays = Delays(gap_s=0.01, transfer_s=0.02)
    found = mean_delays(simulate(plan, durations(F=1.0, B=2.0, I=1.0, W=1.0), delays))
    assert found.gap_s == pytest.approx(delays.gap_s, rel=0.5)
    assert found.transfer_s == pytest.approx(delays.transfer_s, rel=0.5)


def test_mean_duration() -> None:
    done = [
        Operation(0, 0, "F", 0, 0.0, 1.0),
        Operation(0, 0, "F", 1, 5.0, 8.0),
        Operation(0, 0, "B", 0, 0.0, 9.0),
    ]
    assert mean_duration_s(done)(Action(0, "F", 7)) == 2.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_microbatches_leave_less_bubble(schedule: str) -> None:
    stages_per_rank = SCHEDULES[schedule].stages_per_rank
    seconds = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
    bubbles = [bubble(schedule, 4, microbatches, stages_per_rank, **seconds) for microbatches in (8, 16, 32)]
    assert bubbles == sorted(bubbles, reverse=True)
