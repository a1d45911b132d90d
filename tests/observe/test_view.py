from __future__ import annotations

import json
from pathlib import Path

import pytest

from muster.observe.records import RunLog
from muster.observe.view import view


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run": {"name": "mine"}, "steps": 100}))
    return folder


def test_a_run_at_a_glance(folder: Path) -> None:
    log = RunLog(folder)
    log.event("started", step=0)
    log.metrics(10, loss=3.0, tokens_per_s=100.0)
    log.metrics(10, held_out_loss=3.1, held_out_bits_per_byte=1.9)
    log.metrics(20, loss=2.0, tokens_per_s=200.0)
    seen = view(folder)
    assert seen is not None
    assert (seen.name, seen.state, seen.step, seen.steps) == ("mine", "running", 20, 100)
    assert (seen.loss, seen.bits_per_byte, seen.tokens_per_s) == (2.0, 1.9, 200.0)
    assert seen.size_bytes > 100
    assert seen.age_s is not None
    assert seen.age_s >= 0
    log.close()


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "new"),
        (["started"], "stopped"),
        (["started", "checkpoint"], "stopped"),
        (["started", "finished"], "finished"),
        (["started", "failed"], "failed"),
        (["started", "failed", "started"], "stopped"),
    ],
)
def test_states_of_a_run_that_nobody_works_on(folder: Path, events: list[str], state: str) -> None:
    log = RunLog(folder)
    for event in events:
        log.event(event, step=0)
    log.close()
    seen = view(folder)
    assert seen is not None
    assert seen.state == state


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"run": 3}', "{", "[" * 100_000])
def test_a_folder_without_a_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert view(tmp_path) is None


def test_broken_records(folder: Path) -> None:
    (folder / "events.jsonl").write_text('{"event": ["started"]}\n{"event": 5, "time": "soon"}\n')
    (folder / "metrics.jsonl").write_text('{"step": "x", "loss": true}\n{"step"')
    (folder / "dangling").symlink_to(folder / "nowhere")
    seen = view(folder)
    assert seen is not None
    assert (seen.state, seen.step, seen.loss, seen.age_s) == ("new", 0, None, None)
