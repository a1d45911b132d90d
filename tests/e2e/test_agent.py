"""Faults of a whole job, with real signals: it goes on, and its losses are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import faults_restart as trial
from muster.config.load import load_run
from muster.observe.records import read_jsonl

RUN_FILE = """
name: {name}
model: {{family: llama, layers: 1, width: 32, heads: 2, context: 32}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: 100M, batch_tokens: 256, log_every: 1, precision: fp32, schedule: {{kind: constant, warmup: 0}}}}
layout: {{replicate: 2}}
checkpoint: {{every: 5 steps, keep: 3}}
"""
"""Far longer than any test: they stop it, and a constant rate makes a shorter run the same."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + trial.CORPUS * 9)
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(name="run"))
    return tmp_path


def undisturbed(folder: Path, steps: int, ranks: int, run_ranks: Any) -> dict[int, float]:
    """The losses of the first steps, trained by ranks that nobody touches."""
    run = load_run(
        folder / "run.yaml", [f"train.tokens={steps * 256}", f"layout.replicate={ranks}"]
    ).to_dict()
    from tests.toy import train_here

    run_ranks(ranks, train_here, run, str(folder), str(folder / "runs" / "straight"))
    return trial.losses(folder, "straight")


def said(folder: Path) -> str:
    return (folder / "run.log").read_text()


def children(agent: int) -> list[psutil.Process]:
    return psutil.Process(agent).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def end(*jobs: subprocess.Popen[bytes]) -> None:
    for job in jobs:
        if job.poll() is None:
            job.kill()
        job.wait()


def test_kills_and_stops_of_one_machine(folder: Path, run_ranks: Any) -> None:
    chance = random.Random(1)
    job = trial.start(folder, "run")
    try:
        trial.wait_event(folder, "run", "checkpoint", job)
        for _ in range(2):
            trial.kill_a_rank(folder, "run", job, chance)
        os.kill(chance.choice(trial.rank_pids(job.pid)), signal.SIGTERM)  # one rank only
        assert job.wait(timeout=60) == 75, said(folder)
        assert "is saved: run the same command again" in said(folder).splitlines()[-1]

        job, began = trial.start(folder, "run"), time.time()
        trial.wait_event(folder, "run", "checkpoint", job, after=began)
        os.kill(job.pid, signal.SIGINT)  # the agent
        assert job.wait(timeout=60) == 75, said(folder)
        resumed = [event["step"] for event in trial.events(folder, "run", "resumed")]
        stopped = trial.events(folder, "run", "preempted")
        assert f"stopped at step {resumed[-1]}" in stopped[0]["error"]  # not a step was lost

        job, began = trial.start(folder, "run", "faults.restarts=0"), time.time()
        trial.wait_event(folder, "run", "checkpoint", job, after=began)
        family = children(job.pid)
        os.kill(trial.rank_pids(job.pid)[1], signal.SIGKILL)
        assert job.wait(timeout=60) == 1
        assert "rank 1 was killed by SIGKILL" in said(folder).splitlines()[-1]
        assert gone(family)

        job, began = trial.start(folder, "run"), time.time()
        trial.wait_event(folder, "run", "checkpoint", job, after=began)
        family = children(job.pid)
        assert len(family) == 3
        os.kill(job.pid, signal.SIGKILL)  # the agent, without a word
        job.wait()
        assert gone(family)
    finally:
        end(job)
    got = trial.losses(folder, "run")
    steps = max(got)
    assert sorted(got) == list(range(1, steps + 1))
    assert undisturbed(folder, steps, 2, run_ranks) == got


@pytest.mark.long
def test_ranks_that_do_not_stop_are_killed(folder: Path) -> None:
    job = trial.start(folder, "run", "faults.grace=2s")
    try:
        trial.wait_event(folder, "run", "checkpoint", job)
        os.kill(trial.rank_pids(job.pid)[1], signal.SIGSTOP)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(timeout=60) == 75
        assert "did not save within 2 s (faults.grace)" in said(folder).splitlines()[-1]

        job, began = trial.start(folder, "run"), time.time()
        trial.wait_event(folder, "run", "checkpoint", job, after=began)
        family = children(job.pid)
        os.kill(trial.rank_pids(job.pid)[1], signal.SIGSTOP)
        os.kill(job.pid, signal.SIGINT)
        time.sleep(1.0)
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(timeout=10) == 130
        assert gone(family)
    finally:
        end(job)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thirty_kills(tmp_path: Path) -> None:
    restarts, equal = trial.trials(tmp_path, 30, 7)
    assert len(restarts) == 30
    assert equal


def test_a_node_is_lost_and_comes_back(folder: Path, run_ranks: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    many = ["--nodes", "1:2", "--rendezvous", address, "--ranks-per-node", "1"]
    first = trial.start(folder, "run", *many)
    second = None
    try:
        second = trial.start(folder, "run", *many)
        placed = trial.wait_event(folder, "run", "placed", first)
        trial.wait_event(folder, "run", "checkpoint", first, after=placed["time"])
        worlds = [placed["world"]]
        family, lost = children(second.pid), time.time()
        os.kill(second.pid, signal.SIGKILL)
        second.wait()
        assert gone(family)
        placed = trial.wait_event(folder, "run", "placed", first, after=lost)
        worlds.append(placed["world"])
        trial.wait_event(folder, "run", "checkpoint", first, after=placed["time"])

        second = trial.start(folder, "run", *many)
        grown = trial.wait_event(folder, "run", "growing", first, after=placed["time"])
        placed = trial.wait_event(folder, "run", "placed", first, after=grown["time"])
        worlds.append(placed["world"])
        trial.wait_event(folder, "run", "checkpoint", first, after=placed["time"])
        assert worlds == [2, 1, 2], said(folder)
        os.kill(first.pid, signal.SIGTERM)
        assert [first.wait(timeout=60), second.wait(timeout=60)] == [75, 75], said(folder)
    finally:
        end(*[job for job in (first, second) if job is not None])
    got = trial.losses(folder, "run")
    expected = undisturbed(folder, max(got), 2, run_ranks)
    assert got == pytest.approx(expected, rel=1e-5)
    events = read_jsonl(folder / "runs" / "run" / "events.jsonl")
    layouts = [event["layout"] for event in events if event["event"] == "started"]
    assert ["replicate 1" in layout for layout in layouts] == [False, True, False]
