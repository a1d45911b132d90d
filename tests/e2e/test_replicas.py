"""State in the memory of nodes: whatever is killed, the run goes on from there, with no checkpoint and bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import faults_restart as trial
from muster.checkpoint.keeper import PREFIX, TMPFS
from muster.config.load import load_run

RUN_FILE = """
name: run
model: {family: llama, layers: 1, width: 32, heads: 2, context: 32}
data: {train: [{files: "*.py"}], held_out: 5%}
train: {tokens: 100M, batch_tokens: 192, log_every: 1, precision: fp32, schedule: {kind: constant, warmup: 0}}
layout: {shard: 2, zero: 3, microbatch: 1}
checkpoint: {every: 10000000 steps, memory: 10 steps}
"""
"""No checkpoint is written before the end, so none can be read."""
STEPS = 10


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + trial.CORPUS * 9)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    before = in_memory()
    yield tmp_path
    assert in_memory() <= before


def in_memory() -> set[Path]:
    return set(TMPFS.glob(f"{PREFIX}*"))


def memory_of(agent: int) -> Path:
    """The folder that an agent has locked."""
    (found,) = {
        Path(os.readlink(link))
        for link in Path(f"/proc/{agent}/fd").iterdir()
        if os.readlink(link).startswith(str(TMPFS / PREFIX))
    }
    return found


def undisturbed(folder: Path, steps: int, layout: str, ranks: int, run_ranks: Any) -> dict[int, float]:
    from tests.toy import train_here

    run = load_run(folder / "run.yaml", [f"train.tokens={steps * 192}", layout]).to_dict()
    run_ranks(ranks, train_here, run, str(folder), str(folder / "runs" / "straight"))
    return trial.losses(folder, "straight")


def said(folder: Path) -> str:
    return (folder / "run.log").read_text()


def wait(
    folder: Path, kind: str, job: subprocess.Popen[bytes], after: float = 0.0, least: int = 0
) -> dict[str, Any]:
    return trial.wait_event(folder, "run", kind, job, after=after, least=least)


def stop(*jobs: subprocess.Popen[bytes]) -> list[int]:
    os.kill(jobs[0].pid, signal.SIGTERM)
    return [job.wait(timeout=60) for job in jobs]


def end(*jobs: subprocess.Popen[bytes]) -> None:
    for job in jobs:
        if job.poll() is None:
            job.kill()
        job.wait()


def test_killed_ranks_go_on_from_memory_and_nothing_of_it_is_left(folder: Path, run_ranks: Any) -> None:
    job = trial.start(folder, "run")
    try:
        kept = 0
        for victim in (0, 1):
            kept = wait(folder, "memory", job, least=kept + 1)["step"]
            killed = time.time()
            os.kill(trial.rank_pids(job.pid)[victim], signal.SIGKILL)
            resumed = wait(folder, "resumed", job, after=killed)
            assert resumed["source"] == "memory", said(folder)
            assert resumed["step"] >= kept
            assert not list((folder / "runs" / "run").glob("checkpoints/*"))
            kept = resumed["step"]
        wait(folder, "memory", job, after=resumed["time"], least=kept + 1)

        # The agent's own death takes the memory with it; what is left of it is gone when the next one has started.
        held = memory_of(job.pid)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert held.exists()
        began = time.time()
        job = trial.start(folder, "run")
        assert wait(folder, "started", job, after=began)["step"] == 0
        assert not held.exists()
        wait(folder, "memory", job, after=began, least=kept)
        assert stop(job) == [75], said(folder)
    finally:
        end(job)
    got = trial.losses(folder, "run")
    assert got == undisturbed(folder, max(got), "layout.shard=2", 2, run_ranks)


@pytest.mark.parametrize(
    ("wanted", "left"), [(2, 2), pytest.param(3, 2, marks=pytest.mark.long)], ids=["spare", "fewer"]
)
def test_a_node_is_lost_with_its_memory(wanted: int, left: int, folder: Path, run_ranks: Any) -> None:
    """Of three nodes the second; a spare takes its ranks, or two nodes go on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    more = ["--nodes", "2:3", "--rendezvous", address, "--ranks-per-node", "1"]
    more.append(f"layout.shard={wanted}")
    jobs: list[subprocess.Popen[bytes]] = []
    try:
        # One after the other, so that it is known which is the first and which the spare.
        while len(jobs) < 3:
            jobs.append(trial.start(folder, "run", *more))
            joined = 0.0
            for _ in jobs:
                joined = wait(folder, "node-joined", jobs[0], after=joined)["time"]
        placed = wait(folder, "placed", jobs[0])
        while placed["world"] < wanted:
            placed = wait(folder, "placed", jobs[0], after=placed["time"])
        began = wait(folder, "started", jobs[0], after=placed["time"])
        kept = wait(folder, "memory", jobs[0], after=began["time"], least=1)["step"]
        victim = jobs.pop(1)
        lost, memory, family = time.time(), memory_of(victim.pid), psutil.Process(victim.pid).children(True)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        psutil.wait_procs(family, timeout=10)
        shutil.rmtree(memory)
        resumed = wait(folder, "resumed", jobs[0], after=lost)
        assert resumed["source"] == "memory", said(folder)
        assert resumed["step"] >= kept
        assert wait(folder, "placed", jobs[0], after=lost)["world"] == left
        wait(folder, "memory", jobs[0], after=resumed["time"], least=resumed["step"] + 1)
        assert wanted > left or not list((folder / "runs" / "run").glob("checkpoints/*"))  # a save to grow
        assert stop(*jobs) == [75, 75], said(folder)
    finally:
        end(*jobs)
    got = trial.losses(folder, "run")
    expected = undisturbed(folder, max(got), f"layout.shard={wanted}", wanted, run_ranks)
    # Another number of ranks adds in another order: then it is the same bit for bit until the loss alone.
    last = max(got) if wanted == left else resumed["step"]
    assert {step: got[step] for step in range(1, last + 1)} == {
        step: expected[step] for step in range(1, last + 1)
    }
