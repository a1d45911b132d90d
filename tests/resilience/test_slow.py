"""Slow ranks in made-up figures: found within 20 steps, and never in clean ones."""

from __future__ import annotations

import random

import pytest

from muster.resilience.beats import TIMED, StepTimes
from muster.resilience.slow import Slow, SlowRanks


def run(
    ranks: int,
    steps: int,
    *,
    noise: float,
    seed: int,
    slow: int | None = None,
    since: int = 0,
    until: int = 10**9,
) -> list[Slow]:
    """Steps of 1 s with log-normal noise, now and then one of three times as long; `slow` takes twice as long."""
    chance = random.Random(seed)
    watch = SlowRanks([range(ranks)])
    found = []
    for step in range(1, steps + 1):
        for rank in range(ranks):
            factor = 2.0 if rank == slow and since <= step < until else 1.0
            factor *= 3.0 if chance.random() < 0.02 else 1.0
            seconds = [share * factor * chance.lognormvariate(0, noise) for share in (0.02, 0.3, 0.6, 0.08)]
            if rank == slow:
                seconds[2] += 0.1 * factor * (factor > 1)
            found += watch.feed(rank, [StepTimes(step=step, seconds=tuple(seconds))])
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_no_false_alarm_in_1000_clean_steps(ranks: int, noise: float) -> None:
    for seed in range(3):
        assert run(ranks, 1000, noise=noise, seed=seed) == []


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_twice_as_slow_is_seen_within_20_steps(ranks: int, noise: float) -> None:
    for seed in range(3):
        slow = seed % ranks
        first, *more = run(ranks, 200, noise=noise, seed=seed, slow=slow, since=50)
        assert (first.rank, first.is_slow, more) == (slow, True, [])
        assert first.step < 70
        assert first.ratio == pytest.approx(2.0, rel=0.4)
        assert f"rank {slow} is slow" in str(first)
        assert "backward" in str(first)


def test_a_rank_that_recovers_is_said_once() -> None:
    first, second = run(4, 200, noise=0.05, seed=1, slow=2, since=50, until=100)
    assert (first.rank, first.is_slow) == (second.rank, not second.is_slow) == (2, True)
    assert 100 < second.step < 120


def test_stages_of_a_pipeline_are_not_compared_with_each_other() -> None:
    watch = SlowRanks([[0, 1], [2, 3]])
    for step in range(1, 100):
        for rank in range(4):
            seconds = tuple((1.0 if rank < 2 else 3.0) / len(TIMED) for _ in TIMED)
            assert watch.feed(rank, [StepTimes(step=step, seconds=seconds)]) == []


def test_rows_that_were_told_before_or_were_lost_do_no_harm() -> None:
    watch = SlowRanks([[0, 1]])
    rows = [StepTimes(step=step, seconds=(0.0, 1.0, 2.0, 0.1)) for step in range(1, 60)]
    for start in range(0, 59, 3):
        for rank in (0, 1):
            window = rows[max(start - 10, 0) : start + 2 - rank]
            assert watch.feed(rank, window) == []
