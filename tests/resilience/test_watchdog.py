"""Faults planted in real ranks: the watchdog names the right one. 100 trials: `python -m benchmarks.faults_hang`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.faults_hang import FAULTS, Fault, trial

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("kind", FAULTS)
def test_the_culprit_is_named(kind: str, tmp_path: Path) -> None:
    fault = Fault(kind=kind, rank=1, step=4, place=3)
    done = trial(fault, ranks=3, folder=tmp_path, hang_after_s=1.5)
    assert done.verdict is not None
    assert (done.verdict.ranks, done.verdict.cause) == ((1,), FAULTS[kind]), done.verdict
    if kind in ("error", "kill"):
        assert done.report is None
        return
    assert done.report == tmp_path / "hang-0001.md"
    text = done.report.read_text()
    for words in ("| 1 (culprit) | ", "## Rank 0", "all_reduce(4000 float)", "in one_step"):
        assert words in text, text


def test_a_time_limit_of_the_process_group_names_the_culprit_too(tmp_path: Path) -> None:
    fault = Fault(kind="data", rank=2, step=3, place=0)
    done = trial(fault, ranks=3, folder=tmp_path, hang_after_s=60, timeout_s=1.5)
    assert done.verdict is not None
    assert done.verdict.ranks == (2,)
    assert "data of step 3" in done.verdict.sentence
    assert "Timed out" not in done.verdict.sentence


def test_a_slow_rank_is_noted_and_is_no_hang(tmp_path: Path) -> None:
    fault = Fault(kind="slow", rank=1, step=20, place=0)
    done = trial(fault, ranks=2, folder=tmp_path, hang_after_s=1.0)
    assert done.verdict is None
    (said,) = done.noted
    assert said.startswith("rank 1 is slow")
    assert "in optimizer" in said
