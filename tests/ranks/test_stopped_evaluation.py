"""A stop signal in the middle of an evaluation ends the run at once, and the evaluation comes when it goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import Preempted
from muster.observe.records import read_jsonl
from tests.toy import STEPS, tiny, train_here, write_corpus


def stopped_in_evaluation(run: dict[str, Any], base: str, folder: str, at: int) -> tuple[int, str]:
    """One rank of two; the second one is asked to stop when it has scored for the `at`-th time. Scores, and the end."""
    from muster.resilience.lifeline import Lifeline
    from muster.train.entry import run_rank
    from muster.train.trainee import Trainee

    lifeline, scores = Lifeline(), 0
    lifeline.install()
    honest = Trainee._score

    def score(self: Trainee, batches: Any) -> Any:
        nonlocal scores
        scores += 1
        if scores == at and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batches)

    Trainee._score = score  # type: ignore[method-assign]
    try:
        run_rank(load_resolved(run), base=Path(base), folder=Path(folder), lifeline=lifeline)
    except Preempted as end:
        return scores, str(end)
    return scores, ""


@pytest.mark.parametrize("layout", [{"shard": 2, "zero": 3}, {"pipeline": 2}], ids=str)
def test_the_last_evaluation_is_broken_off(layout: dict[str, int], run_ranks: Any, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run = tiny(layout=layout, data={"train": [{"files": "*.py"}], "held_out": 0.5})
    run["train"] = run["train"] | {"eval_every": None}
    found = run_ranks(2, stopped_in_evaluation, run, str(tmp_path), str(tmp_path / "run"), 2)
    assert (
        found
        == [(2, f"stopped at step {STEPS} of {STEPS}, which is saved: run the same command again to go on")]
        * 2
    )
    assert not any("held_out_loss" in line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    metrics = run_ranks(2, train_here, run, str(tmp_path), str(tmp_path / "run"))[0]
    assert "held_out_loss" in metrics[-1]


def test_one_in_between_is_broken_off(run_ranks: Any, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run = tiny(layout={"replicate": 2}, data={"train": [{"files": "*.py"}], "held_out": 0.5})
    found = run_ranks(2, stopped_in_evaluation, run, str(tmp_path), str(tmp_path / "run"), 2)
    assert (
        found
        == [(2, f"stopped at step 3 of {STEPS}, which is saved: run the same command again to go on")] * 2
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
