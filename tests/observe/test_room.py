"""A disk that takes no more: records wait in memory, lines are left out, and nobody is ended for it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import pytest

from muster.observe.records import RunLog, read_jsonl
from muster.observe.room import or_not_at_all, say

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux keeps them")


def write_on_a_full_disk(folder: Path) -> None:
    """The kernel takes no byte beyond a file's first 100, and none of any other file; then it takes all again."""
    log = RunLog(folder)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT, 0o644), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    for number in range(50):
        log.event("numbered", number=number)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    log.metrics(1, loss=2.0)
    say("nobody hears this")
    with pytest.raises(ZeroDivisionError), or_not_at_all():
        raise ZeroDivisionError
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.event("room")
    log.metrics(2, loss=1.0)
    log.close()


def test_records_wait_for_room(tmp_path: Path) -> None:
    child = multiprocessing.get_context("forkserver").Process(target=write_on_a_full_disk, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [event["number"] for event in events[:-1]] == list(range(50))
    assert events[-1]["event"] == "room"
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
