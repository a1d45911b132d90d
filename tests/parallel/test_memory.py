"""The memory formulas as a planner uses them: without torch, and with the figures of the papers they come from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.parallel.activations import Activations
from muster.parallel.layout import Layout
from muster.parallel.memory import Memory, estimate
from muster.parallel.shapes import units

SPEC = TransformerSpec(
    family="llama", layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256,
    context=8192, tied=False,
)  # fmt: skip
ALONE = Layout(replicate=1, shard=1, zero=0, recompute="none", microbatch=1, accumulate=1, reason="")


def said(spec: TransformerSpec = SPEC, device: Any = "cuda", **layout: Any) -> Memory:
    return estimate(spec, replace(ALONE, **layout), sequence=8192, precision="bf16", device=device)


def test_a_planner_needs_no_torch() -> None:
    code = "import sys, muster.parallel.memory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "tied": True,
            "norm": "layer",
            "positions": "learned",
            "mlp": "gelu",
            "mlp_bias": True,
            "qkv_bias": True,
        },
        {"qk_norm": True, "out_bias": True},
        {"ffn": 0, "experts": 8, "experts_per_token": 2, "expert_ffn": 512, "shared_ffn": 256},
    ],
)
def test_shapes_are_those_of_the_model(changes: dict[str, Any]) -> None:
    import torch

    spec = replace(SPEC, layers=3, vocab=1000, **changes)
    for layers in (range(3), range(1), range(1, 2), range(2, 3)):
        with torch.device("meta"):
            model = Transformer(spec, layers)
        ours = {name: shape for unit in units(spec, ALONE, layers) for name, shape in unit.shapes.items()}
        assert ours == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_states_are_sixteen_bytes_a_parameter_and_zero_divides_them() -> None:
    """Rajbhandari et al. 2020: of mixed precision, but gradients are summed in fp32 here, so 18 unsharded."""
    count = SPEC.parameters()
    whole = said()
    assert whole.parameters_bytes + whole.optimizer_bytes == 12 * count
    assert whole.gathered_bytes == 2 * count
    assert whole.gradients_bytes == 4 * count
    for zero in (1, 2, 3):
        sharded = said(shard=8, zero=zero)
        assert sharded.optimizer_bytes == whole.optimizer_bytes / 8
        assert sharded.gradients_bytes == whole.gradients_bytes / 8
    assert said(shard=8, zero=2).gathered_bytes == whole.gathered_bytes
    assert said(shard=8, zero=3).gathered_bytes < 0.2 * whole.gathered_bytes
    several = {zero: said(shard=8, zero=zero, accumulate=4).gradients_bytes for zero in (1, 2)}
    assert several == {1: whole.gradients_bytes, 2: whole.gradients_bytes / 8}


def test_flash_attention_keeps_nothing_that_grows_with_the_square_of_tokens() -> None:
    def of(tokens: int, device: str) -> int:
        return Activations(SPEC, ALONE, tokens, 2, device).attend()

    assert of(2048, "cuda") == 2 * of(1024, "cuda")
    assert of(2048, "cpu") > 3 * of(1024, "cpu")


def test_sequence_parallel_divides_a_block() -> None:
    """Korthikanti et al. 2022: with it only the inputs of two regions stay whole."""
    whole = said().activations_bytes
    tensor = said(tensor=8, sequence_parallel=False).activations_bytes
    sequence = said(tensor=8).activations_bytes
    assert whole / 8 < sequence < tensor < whole
    hidden = 2 * 8192 * SPEC.width
    assert tensor - sequence > 0.8 * SPEC.layers * 2 * hidden * 7 / 8  # the inputs of both norms


def test_full_recomputation_trades_kept_for_transient() -> None:
    none, full = said(), said(recompute="full")
    assert full.activations_bytes < none.activations_bytes / 8
    assert full.backward_bytes > none.backward_bytes
    assert full.total_bytes < none.total_bytes


def test_a_pipeline_keeps_most_where_it_begins() -> None:
    def of(rank: int, schedule: str) -> int:
        layout = replace(ALONE, pipeline=4, accumulate=8, schedule=schedule)
        made = estimate(SPEC, layout, sequence=8192, precision="bf16", device="cuda", pipeline_rank=rank)
        return made.activations_bytes

    kept = [of(rank, "1f1b") for rank in range(4)]
    assert kept == sorted(kept, reverse=True)
    assert of(0, "gpipe") == pytest.approx(2 * kept[0], rel=0.01)


def test_context_divides_tokens() -> None:
    one, four = said(), said(context=4)
    assert four.activations_bytes == pytest.approx(
        one.activations_bytes / 4, rel=0.35
    )  # the head's gradient stays
