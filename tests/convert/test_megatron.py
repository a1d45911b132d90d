"""Megatron-LM's checkpoints arrive bit for bit from any tensor and pipeline layout and set of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muster.convert.megatron_args import spec_of_arguments
from muster.convert.opening import open_source
from muster.errors import CheckpointError, UsageError
from tests.convert.writers import GPT2, STEPS, VOCAB, assert_same, megatron, spec, state_of, values

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "gpt2": GPT2,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2, "virtual": 2}],
    ids=str,
)
def test_any_layout_bit_for_bit(name: str, layout: dict[str, int], tmp_path: Path) -> None:
    model = spec(**MODELS[name])
    state = state_of(model)
    source = open_source(megatron(tmp_path, model, state, padded=VOCAB + 7 - VOCAB % 4, **layout))  # type: ignore[arg-type]
    assert source.spec == model
    assert source.steps == STEPS
    assert source.missing_moments is None
    assert_same(values(source, model), state)


@pytest.mark.parametrize("names", ["te", "legacy"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_other_names_bit_for_bit(names: str, layout: dict[str, int], tmp_path: Path) -> None:
    model = spec(tied=True)
    state = state_of(model)
    source = open_source(megatron(tmp_path, model, state, names=names, padded=VOCAB + VOCAB % 2, **layout))  # type: ignore[arg-type]
    assert_same(values(source, model), state)


def test_without_an_optimizer_there_are_weights(tmp_path: Path) -> None:
    model = spec()
    state = state_of(model)
    source = open_source(megatron(tmp_path, model, state, optimizer=False, tensor=2))
    assert source.missing_moments == "it was saved without its optimizer"
    value = source.values("weights", model)
    for name, tensor in state["weights"].items():
        assert torch.equal(value(name, tensor.shape), tensor.bfloat16().float())


def first_file(folder: Path) -> Path:
    return next(folder.glob("iter_*/mp_rank_00*/model_optim_rng.pt"))


def change(path: Path, **changes: Any) -> None:
    torch.save(torch.load(path, weights_only=False) | changes, path)


def test_moments_that_cannot_be_told_apart_are_left_out(tmp_path: Path) -> None:
    folder = megatron(tmp_path, spec(), state_of(spec()))
    optimizer = torch.load(first_file(folder), weights_only=False)["optimizer"]
    inner = optimizer["optimizer"]
    halved = inner | {"param_groups": inner["param_groups"][:1]}
    for wrong, reason in (
        (
            {"param_state_sharding_type": "dp_zero_gather_scatter", "optimizer": {"param_groups": []}},
            "distributed",
        ),
        (optimizer | {"optimizer": halved}, "no state of"),
        (optimizer | {"fp32_from_fp16_params": [[], []]}, "no form"),
        ([optimizer], "without"),
    ):
        change(first_file(folder), optimizer=wrong)
        source = open_source(folder)
        assert source.missing_moments is not None
        assert reason in source.missing_moments


def test_incomplete_and_mixed_up_checkpoints_are_refused(tmp_path: Path) -> None:
    model, state = spec(), state_of(spec())
    folder = megatron(tmp_path / "a", model, state, tensor=2, pipeline=2)
    (folder / "iter_0000007" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="rank 1, stage 1"):
        open_source(folder)
    folder = megatron(tmp_path / "b", model, state)
    change(first_file(folder), checkpoint_version=1.0)
    with pytest.raises(CheckpointError, match=r"checkpoint_version 1\.0"):
        open_source(folder)
    change(first_file(folder), checkpoint_version=3.0, args=None)
    with pytest.raises(CheckpointError, match="no args"):
        open_source(folder)
    folder = megatron(tmp_path / "c", model, state)
    source = open_source(folder)
    value = source.values("weights", spec(layers=5))
    with pytest.raises(UsageError, match=r"lacks the tensor 'decoder.layers.4"):
        value("layers.4.attention_norm.weight", torch.Size((24,)))
    with pytest.raises(UsageError, match=r"has the tensor 'decoder.layers.3"):
        source.values("weights", spec(layers=3))
    (folder / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(CheckpointError, match="latest_checkpointed_iteration"):
        open_source(folder)
    (folder / "iter_0000009").mkdir()
    with pytest.raises(CheckpointError, match="torch_dist"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 8}, "num_experts: 8"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"multi_latent_attention": True}, "multi_latent"),
        ({"normalization": "LayerNorm"}, "no family here"),
        ({"num_layers": None}, "num_layers is None"),
    ],
    ids=str,
)
def test_models_that_cannot_be_represented_are_refused(change: dict[str, Any], message: str) -> None:
    from tests.convert import writers

    arguments = vars(writers._arguments(spec(), 1, 1, 0))
    assert spec_of_arguments(arguments) == spec()
    with pytest.raises(UsageError, match=message):
        spec_of_arguments(arguments | change)
