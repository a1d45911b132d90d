"""A rank that stops or dies in the middle of a real run: the command ends with its name and what it was doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muster.chaos import inject
from muster.observe.records import read_jsonl
from tests.toy import write_corpus

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

RUN_FILE = """
name: run
model: {family: llama, layers: 2, width: 32, heads: 2, context: 32}
data: {train: [{files: "*.py"}]}
train: {tokens: 4Mi, batch_tokens: 256, log_every: 5}
layout: {shard: 2, zero: 3}
faults: {hang_after: 2s, restarts: 0}
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """`muster train`, once its ranks train."""
    write_corpus(folder)
    (folder / "run.yaml").write_text(RUN_FILE)
    job = subprocess.Popen(
        [sys.executable, "-m", "muster", "train", "run.yaml"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while job.poll() is None and not read_jsonl(folder / "runs" / "run" / "metrics.jsonl"):
        time.sleep(0.05)
    assert job.poll() is None, job.stderr and job.stderr.read()
    return job


@pytest.mark.parametrize(
    ("number", "sent", "said"),
    [(1, signal.SIGSTOP, "rank 1 was stopped"), (0, signal.SIGSEGV, "rank 0 was killed by SIGSEGV")],
)
def test_the_culprit_is_named_last(number: int, sent: signal.Signals, said: str, tmp_path: Path) -> None:
    job = start(tmp_path)
    try:
        inject.send(inject.ranks_of(job.pid)[number], sent)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("muster: ")
    assert said in last, last
    assert " of step " in last, last
    reports = list((tmp_path / "runs" / "run").glob("hang-*.md"))
    assert len(reports) == (sent == signal.SIGSTOP)
    for report in reports:
        text = report.read_text()
        for words in (f"| {number} (culprit) |", "message(", "loop.py"):
            assert words in text, text
