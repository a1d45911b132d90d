"""Model families: what a Hugging Face config.json and its tensor names mean in our terms, and back.

An option that the transformer here does not have is refused by name; silently ignoring one
would load a different model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from muster.errors import UsageError
from muster.model.families_moe import (
    dots1_config,
    dots1_spec,
    mixtral_config,
    mixtral_spec,
    qwen3_moe_config,
    qwen3_moe_spec,
)
from muster.model.hf_config import (
    Config,
    count,
    number,
    refuse_window,
    require,
    rotary_config,
    rotary_spec,
)
from muster.model.hf_tensors import (
    Foreign,
    gpt2_tensors,
    mixtral_tensors,
    qwen_moe_tensors,
    rotary_tensors,
)
from muster.model.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class Family:
    architecture: str
    """The class that transformers loads it with."""
    to_spec: Callable[[Config], TransformerSpec]
    to_config: Callable[[TransformerSpec], dict[str, Any]]
    tensors: Callable[[TransformerSpec], dict[str, Foreign]]
    optional_prefix: str = ""
    """Prefix that some files of this family leave out of every tensor name."""
    buffers: tuple[str, ...] = ()
    """Endings of tensors that older files hold although they follow from config.json."""


def spec_of(config: Config) -> TransformerSpec:
    """The specification that a config.json describes; UsageError names what cannot be represented."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UsageError(
            f"model_type {kind!r} is not one of {', '.join(FAMILIES)}: this model cannot be loaded"
        )
    if config.get("quantization_config") is not None:
        raise UsageError("quantization_config: quantized weights cannot be loaded; use the unquantized model")
    spec = FAMILIES[kind].to_spec(config)
    if spec.heads % spec.kv_heads:
        raise UsageError(
            f"num_key_value_heads: {spec.kv_heads} does not divide the {spec.heads} attention heads"
        )
    if spec.positions == "rope" and spec.head_dim % 2:
        raise UsageError(f"head_dim: {spec.head_dim} is odd, and rotary positions need an even one")
    if spec.experts_per_token > spec.experts:
        raise UsageError(
            f"num_experts_per_tok: {spec.experts_per_token} exceeds the {spec.experts} experts of a layer"
        )
    return spec


def config_of(spec: TransformerSpec) -> dict[str, Any]:
    """The config.json of a specification, as transformers 4 and 5 read it.

    Raises UsageError where the family's config.json has no word for an option.
    """
    family = FAMILIES[spec.family]
    config = {"architectures": [family.architecture], "model_type": spec.family, **family.to_config(spec)}
    understood = spec_of(config)
    for field in fields(spec):
        said, meant = getattr(understood, field.name), getattr(spec, field.name)
        if said != meant:
            raise UsageError(
                f"a {spec.family} config.json cannot say {field.name}: {meant!r} (it reads as {said!r}): "
                f"this model cannot be saved"
            )
    return config


def _llama_spec(config: Config) -> TransformerSpec:
    bias = bool(config.get("attention_bias", False))
    return rotary_spec(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral_spec(config: Config) -> TransformerSpec:
    unlimited = config.get("sliding_window", 4096) is None
    return rotary_spec(config, window=None if unlimited else count(config, "sliding_window", 4096))


def _qwen2_spec(config: Config) -> TransformerSpec:
    refuse_window(config)
    return rotary_spec(config, qkv_bias=True)


def _qwen3_spec(config: Config) -> TransformerSpec:
    refuse_window(config)
    bias = bool(config.get("attention_bias", False))
    return rotary_spec(config, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _gpt2_spec(config: Config) -> TransformerSpec:
    require(config, "activation_function", "gelu_new")
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    require(config, "tie_word_embeddings", True)
    width, heads = count(config, "n_embd"), count(config, "n_head")
    if width % heads:
        raise UsageError(f"n_head: {heads} heads do not divide n_embd ({width})")
    return TransformerSpec(
        family="gpt2",
        layers=count(config, "n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=count(config, "n_inner", 4 * width),
        vocab=count(config, "vocab_size"),
        context=count(config, "n_positions"),
        tied=True,
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        positions="learned",
        mlp="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _llama_config(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _mistral_config(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {"sliding_window": spec.window}


def _qwen2_config(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {"use_sliding_window": False}


def _qwen3_config(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {"use_sliding_window": False, "attention_bias": spec.qkv_bias}


def _gpt2_config(spec: TransformerSpec) -> dict[str, Any]:
    return {
        "n_embd": spec.width,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn,
        "n_positions": spec.context,
        "vocab_size": spec.vocab,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }


_ROTARY_BUFFERS = (".rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama_spec, _llama_config, rotary_tensors, buffers=_ROTARY_BUFFERS),
    "mistral": Family(
        "MistralForCausalLM", _mistral_spec, _mistral_config, rotary_tensors, buffers=_ROTARY_BUFFERS
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2_spec, _qwen2_config, rotary_tensors),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3_spec, _qwen3_config, rotary_tensors),
    "mixtral": Family(
        "MixtralForCausalLM", mixtral_spec, mixtral_config, mixtral_tensors, buffers=_ROTARY_BUFFERS
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qwen3_moe_spec, qwen3_moe_config, qwen_moe_tensors),
    "dots1": Family("Dots1ForCausalLM", dots1_spec, dots1_config, qwen_moe_tensors),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2_spec,
        _gpt2_config,
        gpt2_tensors,
        optional_prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}
