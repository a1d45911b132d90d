"""`muster chaos` on real runs: each fault is recovered from and named, and the losses are the undisturbed ones."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from muster.observe.records import read_jsonl
from tests.toy import write_corpus

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc, sets other's limits"
)

RUN_FILE = """
name: run
model: {family: llama, layers: 1, width: 32, heads: 2, context: 32}
data: {train: [{files: "*.py"}], held_out: 5%}
train: {tokens: TOKENS, batch_tokens: 256, precision: fp32, schedule: {kind: constant, warmup: 0}}
layout: {replicate: 2}
checkpoint: {every: 20 steps, keep: 3}
faults: {hang_after: 2s, FAULTS}
"""


def drill(
    folder: Path, *arguments: str, tokens: str, faults: str = "restarts: 10"
) -> subprocess.CompletedProcess[str]:
    write_corpus(folder)
    (folder / "run.yaml").write_text(RUN_FILE.replace("TOKENS", tokens).replace("FAULTS", faults))
    return subprocess.run(
        [sys.executable, "-m", "muster", "chaos", "run.yaml", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def row(said: str, kind: str) -> list[int]:
    """Injected, recovered, named, that could be named."""
    found = re.search(rf"^{kind} +(\d+) +(\d+) +(\d+) of (\d+) ", said, re.MULTILINE)
    assert found, said
    return [int(number) for number in found.groups()]


@pytest.mark.parametrize(
    ("kinds", "seed", "count", "tokens"),
    [
        ("kill,disk,poison", 29, 3, "200k"),  # the disk first: it is left alone near the end of a run
        pytest.param("kill,stop,slow,link,disk,flip,poison", 5, 21, "500k", marks=pytest.mark.long),
    ],
)
@pytest.mark.timeout(900)
def test_all_is_recovered_and_the_losses_are_the_undisturbed_ones(
    kinds: str, seed: int, count: int, tokens: str, tmp_path: Path
) -> None:
    asked = ["--faults", kinds, "--every", "1s", "--count", str(count), "--seed", str(seed), "--compare"]
    done = drill(tmp_path, *asked, tokens=tokens)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in kinds.split(","):
        injected, recovered, named, nameable = row(done.stdout, kind)
        assert injected == recovered > 0
        assert named == nameable
    assert "equal the undisturbed run's, bit for bit" in done.stdout
    events = [event["event"] for event in read_jsonl(tmp_path / "runs" / "run" / "events.jsonl")]
    assert {"restart", "checkpoint-failed", "batches-withdrawn"} <= set(events)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_replica_groups(tmp_path: Path) -> None:
    faults = (
        "elastic: true, on_nan: stop, timeouts: {collective: 4s, vote: 6s, quorum: 20s, supervisor: 200s}"
    )
    done = drill(tmp_path, "--every", "2s", "--count", "8", "--seed", "1", tokens="400k", faults=faults)
    assert done.returncode == 0, done.stdout + done.stderr
    injected, recovered, named, nameable = row(done.stdout, "all")
    assert injected == recovered == 8
    assert named == nameable


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_its_run_ends_with_it(how: signal.Signals, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE.replace("TOKENS", "100M").replace("FAULTS", "restarts: 10"))
    command = [sys.executable, "-m", "muster", "chaos", "run.yaml", "--faults", "stop", "--every", "1s"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        assert any("SIGSTOP to rank" in line for line in job.stdout)
        family = psutil.Process(job.pid).children(recursive=True)
        assert len(family) == 4, "the agent, the zygote and two ranks"
        job.send_signal(how)
        job.communicate(timeout=30)
    finally:
        job.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_what_cannot_be_survived_is_refused_before_any_process(tmp_path: Path) -> None:
    for arguments, faults, said in (
        (
            ["--faults", "poison"],
            "on_nan: stop",
            "--faults poison cannot be recovered from: this run is to stop",
        ),
        (["--faults", "flip", "checkpoint.keep=1"], "restarts: 1", "no second checkpoint to fall back to"),
        (["--every", "0s"], "restarts: 1", "--every 0s: should be longer than nothing"),
        (["--faults", "rain"], "restarts: 1", "--faults should be some of kill,stop"),
    ):
        done = drill(tmp_path, *arguments, tokens="90k", faults=faults)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "runs").exists()
