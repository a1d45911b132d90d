"""Beside the parity matrix: options of families, of schedules and of optimizers that meet on few layouts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.model.build import spec_from_config
from muster.parallel.catalogue import world_of
from muster.train.verify import Case, case, compare, read_record, train_case
from tests.toy import tiny

SIZES = {"layers": 5, "width": 32, "heads": 4, "context": 64}
EXPERTS = SIZES | {"experts": 4, "experts_per_token": 2, "expert_ffn": 32, "kv_heads": 2}
GPT2 = SIZES | {"family": "gpt2"}
QWEN2 = SIZES | {"family": "qwen2", "kv_heads": 2}
MISTRAL = SIZES | {"family": "mistral", "kv_heads": 2, "window": 10, "tied": True}
MIXTRAL = EXPERTS | {"family": "mixtral"}
DOTS1 = EXPERTS | {"family": "dots1", "shared_ffn": 64}
MUON = {"optimizer": {"kind": "muon", "lr": 1e-3}}
HARD_BALANCE = {"balance": {"coefficient": 0.5}}
HARD_BIAS = {"balance": {"rate": 0.05}}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "learned positions, stages and parts of sequences": (
        GPT2, {}, {"pipeline": 2, "context": 2, "context_kind": "ring", "microbatch": 2},
    ),
    "learned positions, stages and divided tokens": (
        GPT2, {}, {"pipeline": 2, "tensor": 2, "schedule": "interleaved", "recompute": "full"},
    ),
    "biases of kv heads that ranks share": (QWEN2, {}, {"tensor": 4, "microbatch": 2}),
    "a window narrower than a rank's tokens": (MISTRAL, {}, {"context": 4, "context_kind": "ring", "zero": 3}),
    "a window, heads exchanged and divided": (
        MISTRAL, MUON, {"tensor": 2, "context": 2, "context_kind": "ulysses"},
    ),
    "a head of its own, uneven stages": (
        QWEN2, {}, {"pipeline": 2, "schedule": "dualpipev", "split": [2, 1, 1, 1], "microbatch": 2},
    ),
    "muon on stages": (MISTRAL, MUON, {"pipeline": 2, "shard": 2, "schedule": "zbv"}),
    "balance by a loss over microbatches and stages": (
        MIXTRAL, HARD_BALANCE, {"pipeline": 2, "shard": 2, "expert": 2, "schedule": "1f1b", "recompute": "full"},
    ),
    "balance by a loss over parts of sequences": (
        MIXTRAL, HARD_BALANCE, {"context": 2, "tensor": 2, "expert": 2, "microbatch": 4},
    ),
    "balance by bias, shared experts divided": (
        DOTS1, HARD_BIAS, {"shard": 2, "tensor": 2, "expert": 2, "zero": 2, "microbatch": 2},
    ),
    "balance by bias on stages": (DOTS1, HARD_BIAS, {"pipeline": 2, "schedule": "zbv"}),
    "state on disk, stages": (GPT2, {}, {"pipeline": 2, "schedule": "gpipe", "offload": "disk"}),
}  # fmt: skip


def make(model: dict[str, Any], train: dict[str, Any], layout: dict[str, Any]) -> Case:
    run = tiny(model=model)
    run["train"] = run["train"] | {"optimizer": {"lr": 1e-2}} | train
    resolved = load_resolved(run)
    return case(resolved, spec_from_config(resolved.model, 37, Path()), layout, 3)


@pytest.fixture(scope="module")
def reference(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def of(model: dict[str, Any], train: dict[str, Any]) -> Any:
        key = f"{model} {train}"
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            run_ranks(1, train_case, alone := make(model, train, {}), folder)
            made[key] = read_record(alone, folder)
        return made[key]

    return of


@pytest.mark.parametrize("name", CASES)
def test_layout_trains_like_one_process(name: str, reference: Any, run_ranks: Any, tmp_path: Path) -> None:
    model, train, layout = CASES[name]
    made = make(model, train, layout)
    run_ranks(world_of(layout), train_case, made, tmp_path)
    found = compare(read_record(made, tmp_path), reference(model, train))
    assert found.ok, found
