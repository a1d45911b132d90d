"""Policies, breakers and rates, simulated with seeds and virtual time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from muster.serve.router.breaker import FAILURES, LONGEST_PAUSE_S, RETRY_RESERVE, Breaker, RetryBudget
from muster.serve.router.policy import SLACK, Candidate, Policy, PrefixTable, choose
from muster.serve.router.rates import WINDOW_S, Meter, weights
from muster.serve.router.simulate import Arrival, Machine, Simulated, simulate


def shared_prefixes(seed: int, *, requests: int = 400, groups: int = 24, rate: float = 8.0) -> list[Arrival]:
    """Prompts of 64 blocks that groups share and 8 of their own, at the times of a Poisson process."""
    chance = random.Random(seed)
    arrivals, now_s = [], 0.0
    for number in range(requests):
        now_s += chance.expovariate(rate)
        group = chance.randrange(groups)
        keys = [hash((seed, group, block)) for block in range(64)]
        keys += [hash((seed, 1000 + number, block)) for block in range(8)]
        arrivals.append(Arrival(now_s, keys, chance.randint(16, 64)))
    return arrivals


def routed(policy: Policy, arrivals: list[Arrival], rates: list[float], cache_blocks: int = 800) -> Simulated:
    return simulate(policy, arrivals, [Machine(rate, cache_blocks=cache_blocks) for rate in rates])


@pytest.mark.parametrize("seed", range(5))
def test_prefix_affinity_finds_more_and_is_faster_than_the_others(seed: int) -> None:
    arrivals = shared_prefixes(seed)
    by = {policy: routed(policy, arrivals, [900.0] * 3) for policy in ("prefix", "tokens", "round-robin")}
    assert by["prefix"].hit_rate > 1.5 * by["round-robin"].hit_rate
    assert by["prefix"].hit_rate > 1.5 * by["tokens"].hit_rate
    for other in ("tokens", "round-robin"):
        assert np.mean(by["prefix"].latencies_s) < np.mean(by[other].latencies_s)


@pytest.mark.parametrize("seed", range(5))
def test_a_hot_prefix_spreads_over_all_replicas(seed: int) -> None:
    arrivals = shared_prefixes(seed, groups=1, rate=40.0)
    hot, even = routed("prefix", arrivals, [900.0] * 3), routed("tokens", arrivals, [900.0] * 3)
    assert min(hot.requests) > len(arrivals) / 6
    assert np.percentile(hot.latencies_s, 99) < 1.5 * np.percentile(even.latencies_s, 99)


@pytest.mark.parametrize("seed", range(5))
def test_unequal_replicas_get_what_they_can_do(seed: int) -> None:
    arrivals = shared_prefixes(seed, groups=400, rate=5.0)
    weighted = routed("tokens", arrivals, [1500.0, 500.0, 500.0])
    turns = routed("round-robin", arrivals, [1500.0, 500.0, 500.0])
    assert weighted.requests[0] > 1.5 * max(weighted.requests[1:])
    assert np.percentile(weighted.latencies_s, 95) < np.percentile(turns.latencies_s, 95)


def test_equals_take_turns_and_the_least_loaded_is_taken() -> None:
    idle = [Candidate(index, 0.0) for index in (4, 7, 9)]
    assert [choose("tokens", idle, 10.0, {}, turn) for turn in range(3)] == [4, 7, 9]
    assert [choose("round-robin", idle, 10.0, {}, turn) for turn in range(4)] == [4, 7, 9, 4]
    assert choose("tokens", [Candidate(0, 50.0), Candidate(1, 80.0, 2.0)], 10.0, {}, 0) == 1 - (60 < 45)


def test_whoever_knows_the_prompt_gets_it_up_to_the_cap() -> None:
    def chosen(load: float) -> int:
        return choose("prefix", [Candidate(0, load), Candidate(1, 0.0)], 100.0, {0: 0.9}, 1)

    assert chosen(SLACK * 100) == 0
    assert chosen(SLACK * 100 + 1) == 1
    assert choose("prefix", [Candidate(0, 0.0), Candidate(1, 0.0)], 1.0, {0: 0.2}, 1) == 1  # too little known


def test_the_table_knows_the_longest_beginning_and_forgets() -> None:
    table = PrefixTable(limit=6)
    table.note([1, 2, 3, 4], 0)
    table.note([1, 2], 1)
    assert table.matched([1, 2, 3, 9]) == {0: 0.75, 1: 0.5}
    assert table.matched([9, 2]) == {}
    table.forget(0)
    assert table.matched([1, 2, 3]) == {1: 2 / 3}
    table.note(range(10, 15), 2)
    assert len(table.blocks) == 6
    assert table.matched(range(10, 15)) == {2: 1.0}


def test_a_breaker_opens_after_failures_in_a_row_and_tries_again_one_by_one() -> None:
    breaker, now_s = Breaker(), 0.0
    for _ in range(FAILURES - 1):
        breaker.failed(now_s)
    breaker.succeeded()
    for _ in range(FAILURES):
        assert breaker.allows(now_s)
        breaker.began()
        breaker.failed(now_s)
    assert not breaker.allows(now_s)
    pauses = []
    for _ in range(8):
        pauses.append(breaker.until_s - now_s)
        now_s = breaker.until_s
        assert breaker.allows(now_s)
        breaker.began()
        assert not breaker.allows(now_s)  # one at a time
        breaker.failed(now_s)
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_S
    now_s = breaker.until_s
    breaker.began()
    breaker.abandoned()
    assert breaker.allows(now_s)
    breaker.began()
    breaker.succeeded()
    assert breaker.allows(now_s)
    assert not breaker.is_open


def test_retries_are_bounded_by_requests() -> None:
    budget, retried = RetryBudget(), 0
    for _ in range(1000):
        budget.arrived()
        retried += budget.take()
        retried += budget.take()
    assert RETRY_RESERVE + 190 < retried < RETRY_RESERVE + 210


def test_a_rate_is_of_busy_time_and_its_highest_of_late_counts() -> None:
    meter = Meter()
    meter.began(100.0)
    meter.delivered(500.0, 100.0 + WINDOW_S)
    assert meter.rate == 500.0 / WINDOW_S
    meter.ended(100.0 + WINDOW_S)
    meter.began(1000.0)  # idle meanwhile
    meter.delivered(50.0, 1000.0 + WINDOW_S)
    assert 0.9 * 500.0 / WINDOW_S < meter.rate < 500.0 / WINDOW_S
    assert weights([meter.rate, None, 1.0]) == [1.0, 1.0, 0.1]
