"""A run so small that a test can afford it, shared by the tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muster.config.load import load_resolved
from muster.observe.records import read_jsonl

STEPS = 6
CORPUS = "for i in range(10):\n    print(i, 'hello world', i * i)\n"


def write_corpus(folder: Path) -> None:
    for number in range(24):
        (folder / f"{number}.py").write_text(f"# file {number}\n" + CORPUS * (3 + number % 5))


def tiny(**changes: Any) -> dict[str, Any]:
    run: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "family": "llama",
            "layers": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "context": 32,
            "tied": True,
        },
        "data": {"train": [{"files": "*.py"}], "held_out": 0.1},
        "train": {
            "tokens": STEPS * 256,
            "batch_tokens": 256,
            "precision": "fp32",
            "log_every": 1,
            "optimizer": {"lr": 1e-3},
            "eval_every": "3 steps",
        },
    }
    return run | changes


def train_here(run: dict[str, Any], base: str, folder: str) -> list[dict[str, Any]]:
    """One rank's part of a run; the run's metrics afterwards."""
    from muster.train.entry import run_rank

    run_rank(load_resolved(run), base=Path(base), folder=Path(folder))
    return read_jsonl(Path(folder) / "metrics.jsonl")
