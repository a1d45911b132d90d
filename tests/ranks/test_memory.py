"""The formulas of `parallel/memory.py` against torch's own accounting of real training steps, rank by rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muster.config.load import load_resolved
from muster.data.packing import Batch
from muster.model.spec import TransformerSpec
from muster.parallel.catalogue import world_of
from muster.parallel.layout import resolve
from muster.parallel.memory import Memory, sums_whole_gradients
from muster.parallel.world import join
from muster.train.memory import Measured, expected, measure
from muster.train.plan import Training
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
    *(
        ("deep", "fp32", {"pipeline": 2, "schedule": schedule, "microbatch": 1})
        for schedule in ("interleaved", "interleaved-zero-bubble", "zbv", "dualpipev")
    ),
]


def spec_of(model: str) -> TransformerSpec:
    figures: dict[str, Any] = {
        "family": "llama", "layers": 4, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 160,
        "vocab": 512, "context": 128, "tied": False,
    }  # fmt: skip
    return TransformerSpec(**(figures | MODELS[model]))


@dataclass(frozen=True)
class Rank:
    training: Training
    said: Memory
    measured: Measured


def step(run: dict[str, Any], spec: TransformerSpec) -> Rank:
    """One rank's part."""
    with join() as world:
        made = load_resolved(tiny(**run))
        batch_tokens = SEQUENCES * spec.context
        made = replace(made, train=replace(made.train, tokens=batch_tokens, batch_tokens=batch_tokens))
        layout = resolve(made, spec, cores=1, gpus=0, ranks=world.size)
        training = Training(
            run=made, folder=Path(), spec=spec, layout=layout, model_folder=None,
            sequence=spec.context, steps=1,
        )  # fmt: skip
        batches = [random_batch(layout.microbatch, spec, number) for number in range(layout.accumulate)]
        return Rank(training, expected(training, world), measure(training, world, batches))


def random_batch(rows: int, spec: TransformerSpec, seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    tokens, targets = (generator.integers(0, spec.vocab, (rows, spec.context), dtype=np.int64) for _ in "ab")
    return Batch(tokens, targets, np.zeros(tokens.shape, dtype=np.int32))


def ranks_of(run_ranks: Any, case: Case, **optimizer: Any) -> list[Rank]:
    model, precision, layout = case
    train = tiny()["train"] | {"precision": precision}
    train["optimizer"] = train["optimizer"] | optimizer
    run = {"train": train, "layout": layout}
    found: list[Rank] = run_ranks(world_of(layout), step, run, spec_of(model))
    return found


@pytest.mark.parametrize("case", RECOMPUTE + KINDS + ZERO + CONTEXT + TENSOR, ids=str)
def test_formulas(case: Case, run_ranks: Any) -> None:
    for rank in ranks_of(run_ranks, case):
        said, measured = rank.said, rank.measured
        assert said.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.05)
        assert said.parameters_bytes == pytest.approx(measured.parameters_bytes, rel=0.01)
        assert said.gathered_bytes == pytest.approx(measured.gathered_bytes, rel=0.01)
        assert said.optimizer_bytes == pytest.approx(measured.optimizer_bytes, rel=0.01)
        if not sums_whole_gradients(rank.training.layout):
            assert said.gradients_bytes == pytest.approx(measured.gradients_bytes, rel=0.01)
        assert said.total_bytes == pytest.approx(measured.total_bytes, rel=0.1)


@pytest.mark.parametrize("case", PIPELINE, ids=str)
def test_stages(case: Case, run_ranks: Any) -> None:
    for rank in ranks_of(run_ranks, case):
        said, measured = rank.said, rank.measured
        # The meter also sees the buffers in which later microbatches' hidden states arrive.
        assert said.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.1)
        assert said.parameters_bytes == pytest.approx(measured.parameters_bytes, rel=0.01)
        assert said.gathered_bytes == pytest.approx(measured.gathered_bytes, rel=0.01)
        assert said.total_bytes == pytest.approx(measured.total_bytes, rel=0.1)


def test_muon(run_ranks: Any) -> None:
    for rank in ranks_of(run_ranks, ("qwen3", "bf16", {"shard": 2, "zero": 3}), kind="muon"):
        assert rank.said.optimizer_bytes == pytest.approx(rank.measured.optimizer_bytes, rel=0.01)
        assert rank.said.optimizer_bytes < 1.5 * rank.said.parameters_bytes


def test_recomputation_saves_what_it_is_for(run_ranks: Any) -> None:
    """Not only is each figure right: what is expected to shrink shrinks."""
    none, selective, full = (
        ranks_of(run_ranks, ("llama", "fp32", {"recompute": kind, "microbatch": 4}))[0].measured
        for kind in ("none", "selective", "full")
    )
    assert full.activations_bytes < 0.2 * none.activations_bytes
    assert full.activations_bytes < selective.activations_bytes < 0.8 * none.activations_bytes
