"""`muster train` gives the same losses, gradients and weights on 1, 2 and 4 ranks and every ZeRO stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

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


AXES = ("replicate", "shard", "context", "tensor", "pipeline")
LAYOUTS: dict[str, dict[str, Any]] = {
    "replicate 2": {"replicate": 2},
    "replicate 4": {"replicate": 4},
    **{f"zero {zero} on {n}": {"shard": n, "zero": zero} for zero in (1, 2, 3) for n in (2, 4)},
    "hybrid 2 x 2": {"replicate": 2, "shard": 2, "zero": 3},
    "zero 1, accumulated": {"shard": 2, "zero": 1, "microbatch": 1},
    "zero 2, accumulated": {"shard": 2, "zero": 2, "microbatch": 1},
    "zero 3, accumulated, recomputed": {"shard": 2, "zero": 3, "microbatch": 2, "recompute": "full"},
    "replicate 2, accumulated": {"replicate": 2, "microbatch": 1},
    "recomputed": {"recompute": "full", "microbatch": 2},
    "tensor 2": {"tensor": 2},
    "tensor 4, kv heads shared": {"tensor": 4},
    "tensor 2 without sequence": {"tensor": 2, "sequence_parallel": False},
    "tensor 4 without sequence": {"tensor": 4, "sequence_parallel": False},
    "tensor 2 x zero 3 on 2": {"tensor": 2, "shard": 2, "zero": 3},
    "tensor 2 x replicate 2, accumulated": {"tensor": 2, "replicate": 2, "microbatch": 1},
    **{f"pipeline 2, {kind}": {"pipeline": 2, "schedule": kind} for kind in ("gpipe", "1f1b")},
    "pipeline 2 x shard 2": {"pipeline": 2, "shard": 2},
    "pipeline 2 x tensor 2": {"pipeline": 2, "tensor": 2},
    "pipeline 2 x replicate 2 x tensor 2": {"pipeline": 2, "replicate": 2, "tensor": 2},
    **{
        f"context {n}, {kind}": {"context": n, "context_kind": kind}
        for n in (2, 4)
        for kind in ("ring", "ulysses")
    },
    "context 2 x tensor 2": {"context": 2, "tensor": 2},
    "context 2 x pipeline 2": {"context": 2, "pipeline": 2},
    "context 2 x shard 2, zero 3": {"context": 2, "shard": 2, "zero": 3},
    "tensor 2, selective": {"tensor": 2, "recompute": "selective"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_curve_as_one_rank(
    name: str, corpus: Path, single: list[dict[str, Any]], run_ranks: Any, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    ranks = math.prod(int(layout.get(axis, 1)) for axis in AXES)
    metrics = run_ranks(ranks, train_here, tiny(layout=layout), str(corpus), str(tmp_path / "tiny"))[0]
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


def test_a_planted_fault_is_seen(
    corpus: Path, single: list[dict[str, Any]], run_ranks: Any, tmp_path: Path
) -> None:
    metrics = run_ranks(
        2, train_unsynced, tiny(layout={"replicate": 2}), str(corpus), str(tmp_path / "tiny")
    )[0]
    ours, reference = metrics[-1]["held_out_loss"], single[-1]["held_out_loss"]
    assert ours != pytest.approx(reference, rel=TOLERANCE), "a skipped all-reduce must not go unnoticed"


def train_unsynced(run: dict[str, Any], base: str, folder: str) -> list[dict[str, Any]]:
    from muster.parallel import data

    honest = data.begin_microbatch
    data.begin_microbatch = lambda model, layout, *, is_last: honest(model, layout, is_last=False)
    return train_here(run, base, folder)
