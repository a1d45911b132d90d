"""Links between the agents of a job: a late one changes nothing, a broken or silent one is a node that is lost."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults_restart as trial
from muster.chaos.links import FAIR, Line, Switchboard, Weather
from muster.resilience.rendezvous import BEAT_S, SILENCE_S
from tests.e2e.test_agent import RUN_FILE, end, said, undisturbed

Two = tuple[Path, subprocess.Popen[bytes], subprocess.Popen[bytes], Switchboard, Line]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    """Two agents that train together, of which the second reaches the first by a line, 20 to 40 ms late."""
    for number in range(20):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + trial.CORPUS * 9)
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(name="run"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    many = ["--nodes", "1:2", "--ranks-per-node", "1", "--rendezvous"]
    first = trial.start(tmp_path, "run", *many, f"127.0.0.1:{port}")
    second = None
    try:
        trial.wait_event(tmp_path, "run", "node-joined", first)
        with Switchboard() as board:
            line = board.line(("127.0.0.1", port), who="second", what="rendezvous")
            board.set(line, Weather(latency_s=0.02, jitter_s=0.02))
            second = trial.start(tmp_path, "run", *many, f"127.0.0.1:{line.port}")
            placed = trial.wait_event(tmp_path, "run", "placed", first)
            assert placed["world"] == 2
            trial.wait_event(tmp_path, "run", "checkpoint", first, after=placed["time"])
            yield tmp_path, first, second, board, line
    finally:
        end(*[job for job in (first, second) if job is not None])


def goes_on_with_both(two: Two, run_ranks: Any, *, after: float) -> None:
    """What follows when the first agent had lost the second one, in a run that goes on to its end on both."""
    folder, first, second, _, _ = two
    both = trial.wait_event(folder, "run", "placed", first, after=after)
    assert both["world"] == 2
    trial.wait_event(folder, "run", "checkpoint", first, after=both["time"])
    first.terminate()
    assert [first.wait(timeout=60), second.wait(timeout=60)] == [75, 75], said(folder)
    got = trial.losses(folder, "run")
    assert got == pytest.approx(undisturbed(folder, max(got), 2, run_ranks), rel=1e-5)


def test_a_link_that_is_reset(two: Two, run_ranks: Any) -> None:
    folder, first, _, board, line = two
    board.set(line, Weather(stalled=True))  # shorter than anybody waits: nothing comes of it
    stalled = time.time()
    trial.wait_event(folder, "run", "checkpoint", first, after=stalled)
    board.set(line, FAIR)
    assert not trial.events(folder, "run", "node-lost")
    board.reset(line)
    lost = trial.wait_event(folder, "run", "node-lost", first)
    placed = trial.wait_event(folder, "run", "placed", first, after=lost["time"])
    if placed["world"] == 1:  # the second agent came back only after the first one had begun alone
        trial.wait_event(folder, "run", "checkpoint", first, after=placed["time"])
        lost = placed
    goes_on_with_both(two, run_ranks, after=lost["time"])


@pytest.mark.long
def test_a_link_that_is_silent(two: Two, run_ranks: Any) -> None:
    """No system ever says so: both of its ends are connected to the proxy, and stay so."""
    folder, first, _, board, line = two
    board.set(line, Weather(stalled=True))
    begun = time.monotonic()
    lost = trial.wait_event(folder, "run", "node-lost", first)
    # The last word was a beat before the silence, or a little more.
    assert time.monotonic() - begun > SILENCE_S - 2 * BEAT_S
    alone = trial.wait_event(folder, "run", "placed", first, after=lost["time"])
    assert alone["world"] == 1, "the second agent cannot come back by a silent link"
    trial.wait_event(folder, "run", "checkpoint", first, after=alone["time"])
    board.set(line, FAIR)
    goes_on_with_both(two, run_ranks, after=alone["time"])
