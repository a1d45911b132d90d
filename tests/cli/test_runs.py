from __future__ import annotations

import json
from pathlib import Path

from muster.observe.records import RunLog
from tests.conftest import Muster


def make_run(folder: Path) -> None:
    log = RunLog(folder)
    (folder / "run.json").write_text(json.dumps({"run": {}, "steps": 200}))
    log.event("started", step=0)
    log.metrics(200, loss=2.5, tokens_per_s=18_300.0)
    log.metrics(200, held_out_bits_per_byte=1.39)
    log.event("finished", step=200)
    log.close()


def test_runs_as_a_table(muster: Muster, tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    (tmp_path / "cache").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "a-file").write_text("")
    code, out, err = muster("runs", "--runs", tmp_path)
    assert (code, err) == (0, "")
    headings, row = out.splitlines()
    assert headings.split() == [
        "run",
        "state",
        "step",
        "loss",
        "bits/byte",
        "tok/s",
        "size",
        "last",
        "record",
    ]
    assert row.split()[:6] == ["mine", "finished", "200/200", "2.5000", "1.3900", "18.3k"]


def test_runs_as_json(muster: Muster, tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    code, out, _ = muster("runs", "--runs", tmp_path, "--json")
    (seen,) = json.loads(out)
    assert code == 0
    assert (seen["name"], seen["state"], seen["step"], seen["bits_per_byte"]) == (
        "mine",
        "finished",
        200,
        1.39,
    )


def test_no_runs(muster: Muster, tmp_path: Path) -> None:
    assert muster("runs", "--runs", tmp_path)[:2] == (
        0,
        f"no runs in {tmp_path} yet: `muster train` makes them\n",
    )
    assert muster("runs", "--runs", tmp_path, "--json")[:2] == (0, "[]\n")
    code, _, err = muster("runs", "--runs", tmp_path / "nowhere")
    assert code == 2
    assert "--runs names another" in err
