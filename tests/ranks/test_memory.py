"""The formulas of `parallel/memory.py` against torch's own accounting of real training steps, rank by rank."""

from __future__ import annotations

from typing import Any

import pytest

from muster.model.spec import TransformerSpec
from tests.ranks.memory import Measured, measure
from tests.toy import tiny

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "deep": {"layers": 6, "width": 48, "heads": 4, "kv_heads": 4, "head_dim": 12, "context": 320},
    "gpt2": {
        "norm": "layer", "positions": "learned", "mlp": "gelu", "qkv_bias": True, "out_bias": True,
        "mlp_bias": True, "tied": True,
    },
    "qwen3": {"qk_norm": True, "vocab": 509, "kv_heads": 1},
    "window": {"window": 48, "layers": 3},
    "mixtral": {"ffn": 0, "experts": 8, "experts_per_token": 2, "expert_ffn": 64},
    "dots1": {
        "ffn": 0, "experts": 8, "experts_per_token": 2, "expert_ffn": 64, "shared_ffn": 32,
        "router": "sigmoid", "router_bias": True, "router_renormalize": True,
    },
}  # fmt: skip
SEQUENCES = 4

Case = tuple[str, str, dict[str, Any]]
RECOMPUTE: list[Case] = [
    (model, precision, {"recompute": kind, "microbatch": 4})
    for kind in ("none", "selective", "full")
    for model, precision in (("llama", "fp32"), ("llama", "bf16"), ("deep", "bf16"), ("gpt2", "fp32"))
]
KINDS: list[Case] = [
    (model, precision, {"microbatch": 4})
    for model in ("qwen3", "window", "mixtral", "dots1")
    for precision in ("fp32", "bf16")
]
ZERO: list[Case] = [
    ("llama", "bf16", {"replicate": 2, "zero": 0}),
    ("llama", "fp32", {"replicate": 4, "zero": 0}),
    *(
        ("qwen3", precision, {"shard": n, "zero": zero, "microbatch": 1})
        for zero in (1, 2, 3)
        for n, precision in ((2, "bf16"), (4, "fp32"))
    ),
    ("llama", "fp32", {"replicate": 2, "shard": 2, "zero": 3}),
    ("mixtral", "bf16", {"shard": 2, "expert": 2, "zero": 3}),
    ("mixtral", "fp32", {"shard": 2, "expert": 2, "tensor": 2, "zero": 1}),
]
CONTEXT: list[Case] = [
    *(
        ("llama", precision, {"context": n, "context_kind": kind, "microbatch": 4})
        for kind in ("ring", "ulysses")
        for n, precision in ((2, "fp32"), (2, "bf16"), (4, "bf16"))
    ),
    ("deep", "bf16", {"context": 2, "context_kind": "ring", "recompute": "selective"}),
    ("deep", "fp32", {"context": 2, "context_kind": "ulysses", "recompute": "selective"}),
]
TENSOR: list[Case] = [
    ("llama", "fp32", {"tensor": 2}),
    ("qwen3", "bf16", {"tensor": 2, "sequence_parallel": False}),
    ("gpt2", "bf16", {"tensor": 2}),
    ("mixtral", "bf16", {"tensor": 2, "sequence_parallel": False}),
]
PIPELINE: list[Case] = [
    ("llama", "fp32", {"pipeline": 2, "schedule": "1f1b", "microbatch": 1}),
    ("llama", "bf16", {"pipeline": 2, "schedule": "gpipe", "microbatch": 1}),
    ("deep", "bf16", {"pipeline": 2, "tensor": 2, "microbatch": 1}),
    ("deep", "fp32", {"pipeline": 2, "schedule": "zbv", "microbatch": 1, "shard": 1}),
    ("deep", "fp32", {"pipeline": 2, "schedule": "interleaved", "microbatch": 1}),
]


def spec_of(model: str) -> TransformerSpec:
    figures: dict[str, Any] = {
        "family": "llama", "layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 160,
        "vocab": 512, "context": 128, "tied": False,
    }  # fmt: skip
    return TransformerSpec(**(figures | MODELS[model]))


def measured(run_ranks: Any, case: Case, **optimizer: Any) -> list[Measured]:
    model, precision, layout = case
    train = tiny()["train"] | {"precision": precision}
    train["optimizer"] = train["optimizer"] | optimizer
    ranks = 1
    for axis in ("replicate", "shard", "context", "tensor", "pipeline"):
        ranks *= layout.get(axis, 1)
    found: list[Measured] = run_ranks(
        ranks, measure, {"train": train, "layout": layout}, spec_of(model), SEQUENCES
    )
    return found


@pytest.mark.parametrize("case", RECOMPUTE + KINDS + ZERO + CONTEXT + TENSOR, ids=str)
def test_formulas(case: Case, run_ranks: Any) -> None:
    for rank in measured(run_ranks, case):
        said = rank.said
        assert said.activations_bytes == pytest.approx(rank.activations_bytes, rel=0.05)
        assert said.parameters_bytes == pytest.approx(rank.parameters_bytes, rel=0.01)
        assert said.gathered_bytes == pytest.approx(rank.gathered_bytes, rel=0.01)
        assert said.optimizer_bytes == pytest.approx(rank.optimizer_bytes, rel=0.01)
        if rank.reduced_each_microbatch:
            assert said.gradients_bytes == pytest.approx(rank.gradients_bytes, rel=0.01)
        assert said.total_bytes == pytest.approx(rank.peak_bytes, rel=0.1)


@pytest.mark.parametrize("case", PIPELINE, ids=str)
def test_stages(case: Case, run_ranks: Any) -> None:
    for rank in measured(run_ranks, case):
        said = rank.said
        assert said.activations_bytes == pytest.approx(rank.activations_bytes, rel=0.1)
        assert said.gathered_bytes == pytest.approx(rank.gathered_bytes, rel=0.01)
        assert said.total_bytes == pytest.approx(rank.peak_bytes, rel=0.1)


def test_muon(run_ranks: Any) -> None:
    for rank in measured(run_ranks, ("qwen3", "bf16", {"shard": 2, "zero": 3}), kind="muon"):
        assert rank.said.optimizer_bytes == pytest.approx(rank.optimizer_bytes, rel=0.01)
        assert rank.said.optimizer_bytes < 1.5 * rank.said.parameters_bytes


def test_recomputation_and_sharding_save_what_the_formulas_say(run_ranks: Any) -> None:
    """Not only is each figure right: what is expected to shrink shrinks."""
    none, selective, full = (
        measured(run_ranks, ("llama", "fp32", {"recompute": kind, "microbatch": 4}))[0]
        for kind in ("none", "selective", "full")
    )
    assert full.activations_bytes < 0.2 * none.activations_bytes
    assert full.activations_bytes < selective.activations_bytes < 0.8 * none.activations_bytes
