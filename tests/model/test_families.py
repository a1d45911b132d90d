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


def test_harmless_options_are_accepted() -> None:
    config = config_of(PRESETS["llama-3-8b"])
    assert spec_of(config | {"attention_dropout": 0.1, "quantization_config": None}) == PRESETS["llama-3-8b"]


@pytest.mark.parametrize(
    ("preset", "change"),
    [("llama-3-8b", {"window": 512}), ("qwen2.5-7b", {"mlp_bias": True}), ("gpt2", {"tied": False})],
)
def test_an_option_that_config_json_cannot_say_is_not_dropped(preset: str, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(change))):
        config_of(replace(PRESETS[preset], **change))
