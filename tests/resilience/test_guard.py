"""What the guard decides, without ranks: which batch a step uses, what becomes of a bad one, what a spike is."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from muster.config import schema
from muster.resilience.guard import MOST_IN_A_ROW, MOST_IN_ALL, Guard
from muster.resilience.spikes import LEAST

CURVE: list[tuple[float, float]] = [
    tuple(pair) for pair in json.loads((Path(__file__).parent / "stdlib-tiny.json").read_text())
]
"""Loss and gradient norm of the 640 steps of recipes/stdlib-tiny.yaml, warm-up included."""


def guard(**faults: Any) -> Guard:
    return Guard(schema.Faults(**faults))


def test_a_step_uses_the_batch_of_its_number_among_those_not_withdrawn() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, withdrawn = guard(), set()
        for _ in range(draw.randrange(8)):
            first = draw.randrange(40)
            last = first + draw.randrange(5)
            one.withdraw(first, last)
            withdrawn |= set(range(first, last + 1))
        left = [batch for batch in range(100) if batch not in withdrawn]
        assert [one.batch_of(step) for step in range(50)] == left[:50]


def test_withdrawing_changes_no_step_before() -> None:
    one = guard()
    one.withdraw(3, 5)
    before = [one.batch_of(step) for step in range(10)]
    one.withdraw(before[7], before[7])
    assert [one.batch_of(step) for step in range(7)] == before[:7]
    assert one.batch_of(7) == before[8]


def test_a_restored_guard_judges_and_counts_as_the_one_it_was_taken_from() -> None:
    one, other = guard(on_spike="stop"), guard(on_spike="stop")
    for loss, norm in CURVE[:100]:
        one.applied(loss, norm)
    one.withdraw(4, 6)
    other.withdraw(9, 9)
    other.restore(json.loads(json.dumps(one.state())))
    assert [other.batch_of(step) for step in (3, 4, 5, 6)] == [3, 7, 8, 10]
    assert other.judge(50.0, 1.0) == one.judge(50.0, 1.0) != None  # noqa: E711
    guard().restore({})  # the manifest of an older version


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (3.0, math.inf), (3.0, math.nan), (math.inf, 1.0)])
def test_what_is_not_finite_is_refused_at_any_time(figures: tuple[float, float]) -> None:
    fault = guard().judge(*figures)
    assert fault is not None
    assert (fault.kind, fault.tolerated) == ("nan", False)


def test_one_bad_batch_is_skipped_and_the_second_in_a_row_rewinds() -> None:
    one = guard(on_nan="rewind")
    assert [one.act(7, "nan"), one.act(7, "nan")] == ["skip", "rewind"]
    one.applied(3.0, 1.0)
    assert [one.act(7, "nan"), one.act(7, "nan")] == ["skip", "stop"]  # rewinding has not helped


def test_rewinding_again_once_the_run_has_got_further() -> None:
    one = guard(on_nan="rewind")
    for step in (7, 9):
        assert [one.act(step, "nan"), one.act(step, "nan")] == ["skip", "rewind"]
        one.applied(3.0, 1.0)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_bad_steps_in_a_row_are_bounded(policy: str) -> None:
    one = guard(on_nan=policy)
    actions = [one.act(7, "nan") for _ in range(MOST_IN_A_ROW + 1)]
    assert actions[-1] == "stop"
    assert "stop" not in actions[:-1]


def test_bad_steps_in_all_are_bounded() -> None:
    one = guard(on_nan="skip")
    for step in range(MOST_IN_ALL):
        assert one.act(step, "nan") == "skip"
        one.applied(3.0, 1.0)
    assert one.act(MOST_IN_ALL, "nan") == "stop"


def test_the_policies_are_told_apart() -> None:
    one = guard(on_nan="stop", on_spike="skip")
    assert (one.act(1, "spike"), one.act(1, "nan")) == ("skip", "stop")


def test_no_false_alarm_on_a_real_curve() -> None:
    one = guard()
    for loss, norm in CURVE:
        assert one.judge(loss, norm) is None
        one.applied(loss, norm)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_no_false_alarm_where_the_loss_falls_fast_or_stands_still(noise: float) -> None:
    draw, one = random.Random(1), guard()
    for step in range(2000):
        loss = 1.5 + 10 * math.exp(-step / 50) + draw.gauss(0, noise)
        norm = math.exp(draw.gauss(0, 5 * noise))
        assert one.judge(loss, norm) is None
        one.applied(loss, norm)


@pytest.mark.parametrize(("loss_by", "norm_by", "said"), [(2.0, 1.0, "loss"), (1.0, 30.0, "gradient norm")])
def test_a_spike_is_seen_in_the_same_step(loss_by: float, norm_by: float, said: str) -> None:
    one = guard()
    for loss, norm in CURVE[:400]:
        one.applied(loss, norm)
    loss, norm = CURVE[400]
    fault = one.judge(loss * loss_by, norm * norm_by)
    assert fault is not None
    assert fault.said.startswith(said)
    assert (fault.kind, fault.tolerated) == ("spike", True)
    refused = guard(on_spike="skip")
    refused.restore(one.state())
    assert not refused.judge(loss * loss_by, norm * norm_by).tolerated  # type: ignore[union-attr]


def test_nothing_is_a_spike_before_enough_has_been_seen() -> None:
    one = guard()
    for _ in range(LEAST - 1):
        one.applied(2.0, 1.0)
    assert one.judge(1000.0, 1000.0) is None
    one.applied(2.0, 1.0)
    assert one.judge(1000.0, 1000.0) is not None
