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
from tests.toy import CORPUS

RUN_FILE = """
name: {name}
model: {{family: llama, layers: 2, width: 64, heads: 4, context: 64}}
data: {{train: [{{files: "*.py"}}], held_out: 5%}}
train: {{tokens: 128Ki, batch_tokens: 512, log_every: 50}}
layout: {{replicate: 2}}
checkpoint: {{every: 7 steps, keep: 3}}
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_killed_again_and_again(kills: int, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + CORPUS * 9)
    for name in ("straight", "killed"):
        (tmp_path / f"{name}.yaml").write_text(RUN_FILE.format(name=name))
    assert start(tmp_path, "straight").wait() == 0

    chance = random.Random(kills)
    reached = []
    for _ in range(kills):
        job = start(tmp_path, "killed")
        # At any moment, of the start, of a step, of a save; but not before there is anything to lose, every time.
        time.sleep(chance.uniform(4.0, 12.0))
        assert job.poll() is None, "the run ended before it was killed: make it longer"
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        reached.append(max(shelf.steps(tmp_path / "runs" / "killed" / "checkpoints"), default=0))
    assert start(tmp_path, "killed").wait() == 0
    assert reached == sorted(reached)

    expected, got = (load_trained(tmp_path / "runs" / name) for name in ("straight", "killed"))
    assert expected.manifest.step == got.manifest.step == 256
    for (name, mine), (_, other) in zip(expected.model.named_parameters(), got.model.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """`muster train` in a process group of its own."""
    command = [sys.executable, "-m", "muster", "train", f"{name}.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
