"""The two ways to start ranks, and what is said when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from muster.export.trained import load_trained
from tests.toy import write_corpus

RUN_FILE = """
name: run
model: {family: llama, layers: 1, width: 32, heads: 2, context: 32}
data: {train: [{files: "*.py"}]}
train: {tokens: 2Ki, batch_tokens: 256}
layout: {replicate: 2}
"""


def muster(folder: Path, *arguments: str, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    start = [*launcher, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m"] if torchrun else ["-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, "muster", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_torchrun_starts_the_same_run(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    for runs, torchrun in (("ours", False), ("theirs", True)):
        done = muster(tmp_path, "train", "run.yaml", "--runs", runs, torchrun=torchrun)
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_trained(tmp_path / runs / "run").model for runs in ("ours", "theirs"))
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the size of files")
def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE + "checkpoint: {every: 1 steps}\n")
    assert muster(tmp_path, "train", "run.yaml", "train.tokens=256", "train.batch_tokens=256").returncode == 0
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from muster.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", "run.yaml", "name=full", "layout={}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "of checkpoint to" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "runs" / "full" / "checkpoints").glob("step-*/manifest.json"))
