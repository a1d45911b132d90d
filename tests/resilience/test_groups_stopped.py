"""Replica groups that are asked to stop, hang, fail again and again, or meet a nan: real processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from muster.errors import Preempted
from muster.observe.records import read_jsonl
from muster.resilience.agent import RankFailed
from muster.resilience.ledger import LEDGER
from tests.resilience.perils import train_groups
from tests.toy import tiny, write_corpus

PER_STEP = 8
pytestmark = pytest.mark.usefixtures("run_ranks")  # for its forkserver, which has torch loaded


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def elastic(steps: int, **faults: Any) -> dict[str, Any]:
    run = tiny(layout={"replicate": 2}, faults={"elastic": True} | faults, checkpoint={"every": "4 steps"})
    run["train"] = run["train"] | {"tokens": steps * 256, "eval_every": None}
    return run


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == kind]


def batches(folder: Path) -> dict[int, int]:
    """The batch of each step, of which all samples were dealt once."""
    found = {}
    for line in read_jsonl(folder / LEDGER):
        dealt = sorted(s for spans in line["samples"].values() for a, b in spans for s in range(a, b))
        batch = dealt[0] // PER_STEP
        assert dealt == list(range(batch * PER_STEP, (batch + 1) * PER_STEP)), line
        found[line["step"]] = batch
    return found


def test_a_signal_to_one_rank_stops_all_groups_and_the_run_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path
) -> None:
    run = elastic(6)
    train_groups(run, corpus, tmp_path / "straight")
    with pytest.raises(Preempted, match="stopped at step 4 of 6, which is saved"):
        train_groups(run, corpus, tmp_path / "stopped", perils=[(1, 3, "term")])
    assert [line["step"] for line in read_jsonl(tmp_path / "stopped" / LEDGER)] == [1, 2, 3, 4]
    train_groups(run, corpus, tmp_path / "stopped")
    assert [line["step"] for line in read_jsonl(tmp_path / "stopped" / LEDGER)] == [1, 2, 3, 4, 5, 6]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_a_signal_to_the_command(corpus: Path, tmp_path: Path) -> None:
    """One of the groups is killed a moment before: whoever is left saves."""
    text = """
name: stopped
model: {family: llama, layers: 2, width: 32, heads: 4, context: 32}
data: {train: [{files: "*.py"}], held_out: 10%}
train: {tokens: 100M, batch_tokens: 256, precision: fp32}
layout: {replicate: 2}
faults: {elastic: true}
"""
    (corpus / "stopped.yaml").write_text(text)
    command = [sys.executable, "-m", "muster", "train", str(corpus / "stopped.yaml"), "--runs", str(tmp_path)]
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen(command, stdout=said, stderr=said)
    folder = tmp_path / "stopped"
    try:
        while len(read_jsonl(folder / LEDGER)) < 5:
            assert agent.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        pids = {event["group"]: event["pids"][0] for event in events(folder, "group-started")}
        os.kill(pids[0], signal.SIGKILL)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 75, (tmp_path / "said").read_text()
    finally:
        agent.kill()
        agent.wait()
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    step = read_jsonl(folder / LEDGER)[-1]["step"]
    assert f"stopped at step {step} of" in last
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    started = [pid for event in events(folder, "group-started") for pid in event["pids"]]
    assert not any(psutil.pid_exists(pid) for pid in started)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_group_that_hangs_is_named_and_started_again(corpus: Path, tmp_path: Path) -> None:
    """Stopped once in the passes, and once while it waits for the others."""
    train_groups(
        elastic(8, hang_after=1.5), corpus, tmp_path / "run", perils=[(1, 3, "stop"), (0, 6, "stop-voted")]
    )
    assert batches(tmp_path / "run") == {step + 1: step for step in range(8)}
    said = [event["message"] for event in events(tmp_path / "run", "group-ended")]
    assert [message[:7] for message in said] == ["group 1", "group 0"]
    assert all("rank 0 was stopped (process state T" in message for message in said), said
    first, second = ((tmp_path / "run" / f"hang-000{n}.md").read_text() for n in (1, 2))
    assert "in group 1" in first
    assert "| 0 (culprit) | 3 | exchange |" in first
    assert "in group 0" in second
    assert "| 0 (culprit) | 6 | groups |" in second


def test_a_group_that_always_fails_is_given_up_and_the_others_finish(corpus: Path, tmp_path: Path) -> None:
    perils = [(1, step, "error") for step in range(1, 31)]
    train_groups(elastic(30), corpus, tmp_path / "run", perils=perils)
    assert list(batches(tmp_path / "run")) == list(range(1, 31))
    ended = events(tmp_path / "run", "group-ended")
    assert [event["group"] for event in ended] == [1, 1, 1]
    assert "ValueError: planted in group 1" in ended[0]["message"]
    (given_up,) = events(tmp_path / "run", "group-given-up")
    assert "group 1 is not started again: the same failure before the first step" in given_up["message"]


def test_a_failure_of_all_groups_restarts_the_run_and_in_the_end_is_said_last(
    corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed) as caught:
        train_groups(elastic(8), corpus, tmp_path / "run", perils=[(0, 6, "error"), (1, 6, "error")])
    why, *trace = str(caught.value).splitlines()
    assert "the same failure after step 5 for the 3rd time in a row" in why
    assert trace[-1].startswith("ValueError: planted in group")
    assert len(events(tmp_path / "run", "restart")) == 2


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_nan_in_one_group_is_withdrawn_by_all(policy: str, corpus: Path, tmp_path: Path) -> None:
    """Twice at step 6, and then a group that has seen neither takes the place of one that has."""
    perils = [(1, 6, "nan"), (1, 6, "nan"), (0, 9, "forward")]
    train_groups(elastic(12, on_nan=policy), corpus, tmp_path / "run", perils=perils)
    withdrawn = [(event["first"], event["last"]) for event in events(tmp_path / "run", "batches-withdrawn")]
    expected = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    if policy == "rewind":  # to step 4, of which a checkpoint has come in the meantime
        expected = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14]
    assert withdrawn == ([(5, 5), (6, 6)] if policy == "skip" else [(5, 5), (4, 6)])
    assert list(batches(tmp_path / "run").values()) == expected
    last = [record for record in read_jsonl(tmp_path / "run" / "sums.jsonl") if record["step"] == 12]
    assert len({record["group"] for record in last}) == 2
    assert len({record["sum"] for record in last}) == 1
