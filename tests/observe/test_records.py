from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from muster.observe.records import RunLog, in_use, read_jsonl


def test_records_are_lines_that_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.event("started", step=0, layout="replicate 2")
    log.metrics(10, loss=2.5)
    log.close()
    (event,), (metric,) = (read_jsonl(tmp_path / "run" / name) for name in ("events.jsonl", "metrics.jsonl"))
    assert event.pop("time") <= metric.pop("time")
    assert event == {"event": "started", "step": 0, "layout": "replicate 2"}
    assert metric == {"step": 10, "loss": 2.5}


def test_what_json_lacks_is_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics(1, loss=math.nan, rate=math.inf, norm=np.float32("nan"), step_count=np.int64(3))
    log.event("note", figures=[math.nan, {"a": -math.inf}], path=tmp_path)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "events.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (metric,), (event,) = read_jsonl(tmp_path / "metrics.jsonl"), read_jsonl(tmp_path / "events.jsonl")
    assert (metric["loss"], metric["rate"], metric["norm"], metric["step_count"]) == (None, None, None, 3)
    assert (event["figures"], event["path"]) == ([None, {"a": None}], str(tmp_path))


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.metrics(1, loss=1.0)
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    log.close()


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    log = RunLog(tmp_path)  # the resumed run
    log.metrics(2, loss=1.0)
    log.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2]


def test_foreign_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'5\n[1]\n\xff\xfe\n\n{"step": 1}\n' + b"[" * 100_000 + b"\n")
    assert read_jsonl(path) == [{"step": 1}]
    assert read_jsonl(tmp_path / "missing.jsonl") == []


def test_the_last_bytes_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    assert [record["step"] for record in read_jsonl(path, last_bytes=40)] == [998, 999]


def test_an_open_log_is_in_use(tmp_path: Path) -> None:
    assert not in_use(tmp_path)
    log = RunLog(tmp_path)
    assert in_use(tmp_path)
    log.close()
    assert not in_use(tmp_path)
