"""The GPU benchmark runs end to end on its toy shape, without anything but the model imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "train.py"


def test_tiny(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tiny", "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["side"] for row in rows] == ["muster", "transformers"]
    assert all(row["tokens_per_s"] > 0 and 0 < row["mfu"] < 1 for row in rows), rows
