"""kill -9 of the whole job at random moments: it resumes each time, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from muster.checkpoint import shelf
from muster.export.trained import load_trained
from muster.observe.records import read_jsonl
from tests.toy import CORPUS

RUN_FILE = """
name: {name}
model: {{family: llama, layers: 2, width: 64, heads: 4, context: 64}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: {tokens}, batch_tokens: 512, log_every: 50}}
layout: {{replicate: 2}}
checkpoint: {{every: 7 steps, keep: 3}}
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_killed_again_and_again(kills: int, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + CORPUS * 9)
    for name in ("straight", "killed"):
        (tmp_path / f"{name}.yaml").write_text(RUN_FILE.format(name=name, tokens=kills * 65_536))
    assert start(tmp_path, "straight").wait() == 0

    chance = random.Random(kills)
    folder = tmp_path / "runs" / "killed"
    reached = []
    for number in range(kills):
        job = start(tmp_path, "killed")
        # Every third time anywhere in the start-up, else in the midst of training and saving.
        if number % 3 < 2:
            wait_for_start(folder, job)
        time.sleep(chance.uniform(0.0, 2.0))
        if job.poll() is not None:
            break  # a fast machine has finished
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        reached.append(max(shelf.steps(folder / "checkpoints"), default=0))
    assert reached
    assert start(tmp_path, "killed").wait() == 0
    assert reached == sorted(reached)

    expected, got = (load_trained(tmp_path / "runs" / name) for name in ("straight", "killed"))
    assert expected.manifest.step == got.manifest.step == kills * 128
    for (name, mine), (_, other) in zip(
        expected.model.named_parameters(), got.model.named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name


def wait_for_start(folder: Path, job: subprocess.Popen[bytes]) -> None:
    """Wait until the ranks of this job train."""
    begun = time.time()
    while job.poll() is None:
        events = read_jsonl(folder / "events.jsonl")
        if any(event["event"] == "started" and event["time"] > begun for event in events):
            return
        time.sleep(0.05)


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """`muster train` in a process group of its own."""
    command = [sys.executable, "-m", "muster", "train", f"{name}.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )
