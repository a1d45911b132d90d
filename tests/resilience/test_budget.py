"""Which failures are worth another attempt, and after how long."""

from __future__ import annotations

from muster.resilience.budget import REPEATS, Budget, Failure


def test_the_budget_is_used_up_with_growing_delays() -> None:
    budget = Budget(restarts=9)
    verdicts = [budget.failed(Failure(sentence="rank 0: x", step=step), committed=5) for step in range(10)]
    assert [verdict.delay_s for verdict in verdicts] == [
        0.0,
        1.0,
        2.0,
        4.0,
        8.0,
        16.0,
        32.0,
        60.0,
        60.0,
        None,
    ]
    assert "all 9 restarts (faults.restarts)" in verdicts[-1].why


def test_a_new_checkpoint_makes_it_whole() -> None:
    budget = Budget(restarts=2)
    delays = [
        budget.failed(Failure(sentence="x", step=step), committed=step).delay_s for step in range(1, 50)
    ]
    assert delays == [0.0] * 49


def test_an_old_checkpoint_does_not() -> None:
    budget = Budget(restarts=2)
    delays = [budget.failed(Failure(sentence="x", step=step), committed=7).delay_s for step in range(3)]
    assert delays == [0.0, 1.0, None]


def test_what_is_certain_is_not_tried_again() -> None:
    verdict = Budget(restarts=10).failed(Failure(sentence="x", certain=True), committed=0)
    assert verdict.delay_s is None


def test_the_same_failure_at_the_same_step() -> None:
    budget = Budget(restarts=100)
    traces = [f"rank {n}: Traceback\n  File x, line 3\nValueError: port {40_000 + n}" for n in range(REPEATS)]
    verdicts = [budget.failed(Failure(sentence=trace, step=41), committed=40) for trace in traces]
    assert [verdict.delay_s is None for verdict in verdicts] == [False] * (REPEATS - 1) + [True]
    assert "the same failure after step 41" in verdicts[-1].why


def test_another_step_or_another_error_in_between_is_not_the_same() -> None:
    budget = Budget(restarts=100)
    for step, text in [
        (41, "a"),
        (42, "a"),
        (41, "a"),
        (41, "b"),
        (41, "a"),
        (41, "a"),
        (42, "a"),
        (41, "a"),
    ]:
        assert budget.failed(Failure(sentence=text, step=step), committed=40).delay_s is not None
