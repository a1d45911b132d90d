"""config.json to a specification and back; an option that would make another model is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from muster.errors import UsageError
from muster.model.families import config_of, spec_of
from muster.model.presets import PRESETS

# Published parameter counts.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_published_size_and_survive_config_json(name: str) -> None:
    assert PRESETS[name].parameters() == PARAMETERS[name]
    assert spec_of(config_of(PRESETS[name])) == PRESETS[name]


def test_defaults_are_those_of_transformers() -> None:
    mistral = config_of(PRESETS["mistral-7b"])
    del mistral["sliding_window"]
    assert spec_of(mistral).window == 4096
    qwen3 = config_of(PRESETS["qwen3-8b"])
    del qwen3["head_dim"]
    assert spec_of(qwen3).head_dim == 128


@pytest.mark.parametrize(
    ("preset", "change", "named"),
    [
        ("llama-3-8b", {"model_type": "gemma3"}, "model_type 'gemma3'"),
        ("llama-3-8b", {"model_type": ["llama"]}, "model_type"),
        ("llama-3-8b", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama-3-8b", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("llama-3-8b", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ("llama-3-8b", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type 'dynamic'"),
        ("llama-3-8b", {"rope_parameters": {"rope_type": "linear"}}, "factor: is missing"),
        ("llama-3-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama-3-8b", {"num_attention_heads": 0}, "num_attention_heads: 0"),
        ("llama-3-8b", {"hidden_size": "4096"}, "hidden_size: '4096'"),
        ("llama-3-8b", {"num_hidden_layers": None}, "num_hidden_layers: is missing"),
        ("llama-3-8b", {"num_key_value_heads": 5}, "num_key_value_heads: 5"),
        ("llama-3-8b", {"head_dim": 7}, "head_dim: 7"),
        ("mistral-7b", {"num_key_value_heads": None}, "num_key_value_heads: is missing"),
        ("qwen2.5-7b", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3-8b", {"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9 exceeds the 8 experts"),
        ("mixtral-8x7b", {"intermediate_size": None}, "intermediate_size: is missing"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ("qwen3-30b-a3b", {"moe_intermediate_size": None}, "moe_intermediate_size: is missing"),
        ("qwen3-30b-a3b", {"use_sliding_window": True}, "use_sliding_window"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gpt2", {"n_head": 7}, "n_head: 7"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    preset: str, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=f"^{named}") as raised:
        spec_of(config_of(PRESETS[preset]) | change)
    assert "\n" not in str(raised.value)


DOTS1 = replace(
    PRESETS["qwen3-8b"], family="dots1", ffn=0, experts=128, experts_per_token=6, expert_ffn=1408, shared_ffn=2816,
    router="sigmoid", router_bias=True,
)  # fmt: skip


def test_dots1_survives_config_json() -> None:
    assert spec_of(config_of(DOTS1)) == DOTS1
    assert config_of(DOTS1)["n_shared_experts"] == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"first_k_dense_replace": 1}, "first_k_dense_replace: 1"),
        ({"n_group": 8}, "n_group: 8"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: 2.5"),
        ({"n_shared_experts": None}, "n_shared_experts: is missing"),
        ({"sliding_window": 4096, "max_window_layers": 20}, "use_sliding_window"),
    ],
)
def test_what_dots1_has_and_we_have_not_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"^{named}"):
        spec_of(config_of(DOTS1) | change)


def test_both_names_of_the_number_of_experts_are_read() -> None:
    config = config_of(PRESETS["qwen3-30b-a3b"])
    config["num_local_experts"] = config.pop("num_experts")
    assert spec_of(config) == PRESETS["qwen3-30b-a3b"]


def test_harmless_options_are_accepted() -> None:
    config = config_of(PRESETS["llama-3-8b"])
    assert spec_of(config | {"attention_dropout": 0.1, "quantization_config": None}) == PRESETS["llama-3-8b"]


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("llama-3-8b", {"window": 512}),
        ("qwen2.5-7b", {"mlp_bias": True}),
        ("gpt2", {"tied": False}),
        ("mixtral-8x7b", {"router_bias": True}),
        ("qwen3-30b-a3b", {"shared_ffn": 768}),
    ],
)
def test_an_option_that_config_json_cannot_say_is_not_dropped(preset: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        config_of(replace(PRESETS[preset], **change))
