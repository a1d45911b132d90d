"""The GPU benchmarks run end to end on their toy shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


def tiny(script: str, out: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--tiny", "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def test_training(tmp_path: Path) -> None:
    rows = tiny("train.py", tmp_path / "result.json")
    assert [row["side"] for row in rows] == ["muster", "transformers"]
    assert all(row["tokens_per_s"] > 0 and 0 < row["mfu"] < 1 for row in rows), rows


def test_serving(tmp_path: Path) -> None:
    rows = tiny("serve.py", tmp_path / "result.json")
    cells = [(row["side"], row["concurrency"]) for row in rows]
    assert cells == [(side, count) for side in ("muster", "transformers") for count in (1, 8)], rows
    assert all(row["decode_tokens_per_s"] > 0 and 0 < row["roofline"] < 1 for row in rows), rows
