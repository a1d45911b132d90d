"""Learning-rate schedules by their definitions."""

from __future__ import annotations

import itertools
import math

import pytest

from muster.config.schema import Schedule
from muster.train.schedule import learning_rate


def curve(steps: int = 100, **options: object) -> list[float]:
    schedule = Schedule(**options)  # type: ignore[arg-type]
    return [learning_rate(step, steps, 2.0, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_never_starts_at_zero(kind: str) -> None:
    rates = curve(kind=kind, warmup=0.1, floor=0.1)
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_last_step_is_at_the_floor(kind: str) -> None:
    rates = curve(kind=kind, warmup=0.1, floor=0.25)
    assert rates[-1] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_cosine_is_halfway_in_the_middle() -> None:
    assert curve(101, kind="cosine", warmup=0.0, floor=0.0)[50] == pytest.approx(1.0)
    assert curve(101, kind="cosine", warmup=0.0, floor=0.0)[25] == pytest.approx(1 + math.cos(math.pi / 4))


def test_wsd_is_flat_until_its_decay() -> None:
    rates = curve(kind="wsd", warmup=0.1, decay=0.2, floor=0.0)
    assert set(rates[10:79]) == {2.0}
    assert rates[79] == pytest.approx(2.0)
    assert rates[80] < 2.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs(steps: int) -> None:
    for kind in ("cosine", "linear", "wsd", "constant"):
        assert all(0 < rate <= 2.0 for rate in curve(steps, kind=kind))
