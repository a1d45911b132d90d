"""However `muster verify` is ended, its ranks end with it; where it can, it takes its files along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toy import write_corpus

RUN_FILE = """
name: run
model: {family: llama, layers: 1, width: 32, heads: 2, context: 32}
data: {train: [{files: "*.py"}]}
train: {tokens: 2Ki, batch_tokens: 256}
layout: {replicate: 2}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(("ending", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_nothing_is_left(ending: str, code: int, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "muster", "verify", "run.yaml", "--steps", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"TMPDIR": str(scratch)}, start_new_session=True
    )
    # One process, the one that forks, its tracker, and the rank of the reference.
    wait_until(lambda: len(of_session(process.pid)) >= 4)
    process.send_signal(signal.Signals[ending])
    assert process.wait(60) == code
    wait_until(lambda: of_session(process.pid) == [])
    if ending != "SIGKILL":
        assert [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")] == []


def of_session(leader: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found += [] if state == "Z" else [int(folder.name)]
        except OSError:
            continue  # it has just ended
    return found


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
