"""A schedule of faults is a pure function of the seed and the run's shape."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise
from statistics import mean

import pytest

from muster.chaos.schedule import KINDS, Fault, Kind, Shape, draw, parse_kinds
from muster.errors import UsageError

SHAPE = Shape(ranks=4, patience_s=10.0)


def first(count: int, seed: int = 0, *, kinds: tuple[Kind, ...] = KINDS, shape: Shape = SHAPE) -> list[Fault]:
    return list(islice(draw(seed, kinds, 30.0, shape), count))


def test_the_same_seed_and_shape_give_the_same_faults() -> None:
    assert first(100) == first(100)
    assert first(10) == first(100)[:10], "however many are asked for"
    assert first(100) != first(100, seed=1)
    assert first(100) != first(100, shape=Shape(ranks=3, patience_s=10.0))


def test_times_are_exponential_and_kinds_come_in_rounds() -> None:
    faults = first(2100)
    gaps = [after - before for before, after in pairwise([0.0, *(fault.at_s for fault in faults)])]
    assert min(gaps) > 0
    assert mean(gaps) == pytest.approx(30.0, rel=0.1)
    assert sum(gap > 30.0 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.04)
    assert Counter(fault.kind for fault in faults) == dict.fromkeys(KINDS, 300)
    for start in range(0, 2100, len(KINDS)):
        assert {fault.kind for fault in faults[start : start + len(KINDS)]} == set(KINDS)
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}


def test_short_is_within_the_run_s_patience_and_long_beyond() -> None:
    for fault in first(500):
        if fault.how == "short":
            assert 0 < fault.lasts_s < SHAPE.patience_s
        elif fault.how == "long":
            assert fault.lasts_s > 3 * SHAPE.patience_s
    assert {fault.how for fault in first(500) if fault.kind == "link"} == {"short", "long", "delay", "reset"}
    assert {fault.how for fault in first(500) if fault.kind == "stop"} == {"short", "long"}


def test_kinds_are_parsed_strictly() -> None:
    assert parse_kinds("stop, kill") == ["kill", "stop"]
    assert {fault.kind for fault in first(20, kinds=("kill",))} == {"kill"}
    for text in ("", "kill,earthquake"):
        with pytest.raises(UsageError, match="some of kill,stop,slow,link,disk,flip,poison"):
            parse_kinds(text)
