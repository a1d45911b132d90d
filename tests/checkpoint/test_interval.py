"""The interval between checkpoints: Daly's optimum of what is measured, within bounds, with its reason."""

from __future__ import annotations

import math

import pytest

from muster.checkpoint.interval import ASSUMED_S, LONGEST_S, History, choose, daly, history
from muster.checkpoint.interval import mean_time_between_failures as between


def lost(interval_s: float, cost_s: float, between_s: float) -> float:
    """Daly's complete model, without the time of a restart: expected time for a second of work, less that second."""
    return between_s / interval_s * math.expm1((interval_s + cost_s) / between_s) - 1


@pytest.mark.parametrize("cost_s", [0.001, 0.1, 10.0, 300.0])
@pytest.mark.parametrize("between_s", [3600.0, 86_400.0])
def test_no_other_interval_loses_less(cost_s: float, between_s: float) -> None:
    best = daly(cost_s, between_s)
    searched = min((lost(best * 1.01**n, cost_s, between_s), n) for n in range(-200, 200))
    assert lost(best, cost_s, between_s) <= searched[0] * 1.001


def test_a_save_dearer_than_the_time_between_failures() -> None:
    assert daly(200.0, 100.0) == 100.0


def test_failures_that_were_seen_count() -> None:
    assert between(History(), machines=1) == ASSUMED_S
    assert between(History(), machines=24) == ASSUMED_S / 24
    # As often as once an hour for ten hours: far from the assumption already.
    assert between(History(failures=10, seconds=36_000), machines=1) == pytest.approx(11_127, rel=0.01)
    # A week without any: rarer than assumed.
    assert between(History(), machines=1, running_s=7 * ASSUMED_S) == 8 * ASSUMED_S


def test_the_choice_has_bounds_and_a_reason() -> None:
    seconds, reason = choose(cost_s=0.05, duration_s=2.0, past=History(), machines=2)
    assert 60 < seconds < 70
    assert reason.startswith("a save stalls training for 50 ms, a failure every 12 h (assumed; 2 machines)")
    seconds, reason = choose(cost_s=1e-5, duration_s=30.0, past=History(failures=9), machines=100)
    assert seconds == 30.0
    assert "a save takes 30 s" in reason
    assert "9 seen" in reason
    assert choose(cost_s=3600.0, duration_s=1.0, past=History(), machines=1)[0] == LONGEST_S


def test_what_a_run_lived_through() -> None:
    def at(time: float, event: str) -> dict[str, object]:
        return {"time": time, "event": event}

    assert history([]) == History()
    killed = [at(0, "started"), at(50, "checkpoint"), at(1000, "started"), at(1010, "failed")]
    assert history(killed) == History(failures=2, seconds=60)
    stopped = [
        at(0, "started"),
        at(50, "preempted"),
        at(99, "resumed"),
        at(100, "started"),
        at(160, "finished"),
    ]
    assert history(stopped) == History(failures=0, seconds=99 + 60)
