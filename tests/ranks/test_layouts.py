"""`muster train`, evaluation included, has the same curves on layouts of every kind (`test_parity.py` has them all)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muster.observe.records import read_jsonl
from muster.parallel.catalogue import world_of
from tests.toy import STEPS, tiny, train_here, write_corpus

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def single(corpus: Path, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("single")
    return run_ranks(1, train_here, tiny(layout={}), str(corpus), str(folder / "tiny"))[0]


LAYOUTS: dict[str, dict[str, Any]] = {
    "replicate 2, accumulated": {"replicate": 2, "microbatch": 1},
    "hybrid 2 x 2": {"replicate": 2, "shard": 2, "zero": 3},
    "zero 1, accumulated": {"shard": 2, "zero": 1, "microbatch": 1},
    "zero 2, accumulated": {"shard": 2, "zero": 2, "microbatch": 1},
    "zero 3, accumulated, recomputed": {"shard": 2, "zero": 3, "microbatch": 2, "recompute": "full"},
    "recomputed": {"recompute": "full", "microbatch": 2},
    "tensor 2 x pipeline 2 x shard 2": {"tensor": 2, "pipeline": 2, "shard": 2},
    "gpipe, recomputed": {"pipeline": 2, "schedule": "gpipe", "recompute": "selective"},
    "context 2 x shard 2, zero 3": {"context": 2, "shard": 2, "zero": 3},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_curve_as_one_rank(
    name: str, corpus: Path, single: list[dict[str, Any]], run_ranks: Any, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    metrics = run_ranks(
        world_of(layout), train_here, tiny(layout=layout), str(corpus), str(tmp_path / "tiny")
    )[0]
    assert [record["step"] for record in metrics] == [record["step"] for record in single]
    compared = 0
    for ours, reference in zip(metrics, single, strict=True):
        for key in ("loss", "gradient_norm", "held_out_loss", "held_out_bits_per_byte", "held_out_tokens"):
            if key in reference:
                assert ours[key] == pytest.approx(reference[key], rel=TOLERANCE), (
                    f"{key} at step {ours['step']}"
                )
                compared += 1
    assert compared >= 2 * STEPS


def test_bf16_follows_fp32(
    corpus: Path, single: list[dict[str, Any]], run_ranks: Any, tmp_path: Path
) -> None:
    run = tiny(layout={"replicate": 2})
    run["train"] = run["train"] | {"precision": "bf16"}
    metrics = run_ranks(2, train_here, run, str(corpus), str(tmp_path / "tiny"))[0]
    for ours, reference in zip(metrics, single, strict=True):
        if "loss" in reference:
            assert ours["loss"] == pytest.approx(reference["loss"], rel=5e-3)


COMPRESSED = {
    "bf16": ({"replicate": 2}, {"gradients": "bf16"}),
    "int8 between copies": ({"replicate": 2}, {"gradients": "int8"}),
    "powersgd": ({"replicate": 2}, {"gradients": "powersgd", "rank": 8}),
    "int8 everywhere": ({"replicate": 2, "shard": 2, "zero": 3}, {"gradients": "int8", "parameters": "int8"}),
    "powersgd and zero 1": ({"replicate": 2, "shard": 2}, {"gradients": "powersgd"}),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_gradients_follow(
    name: str, corpus: Path, single: list[dict[str, Any]], run_ranks: Any, tmp_path: Path
) -> None:
    layout, compress = COMPRESSED[name]
    run = tiny(layout=layout | {"compress": compress})
    metrics = run_ranks(world_of(layout), train_here, run, str(corpus), str(tmp_path / "tiny"))[0]
    for ours, reference in zip(metrics, single, strict=True):
        if "loss" in reference:
            assert ours["loss"] == pytest.approx(reference["loss"], rel=5e-3)
    assert abs(metrics[-1]["held_out_loss"] - single[-1]["held_out_loss"]) < 0.03
    kept = next(event for event in read_jsonl(tmp_path / "tiny/events.jsonl") if event["event"] == "traffic")
    assert sum(kept["sent_bytes"].values()) > 0
