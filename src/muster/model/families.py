"""Model families: what a Hugging Face config.json and its tensor names mean in our terms, and back.

An option that the transformer here does not have is refused by name; silently ignoring one
would load a different model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from muster.errors import UsageError
from muster.model.spec import RopeScaling, TransformerSpec

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Foreign:
    """Where one of our parameters is found in a Hugging Face file."""

    name: str
    transposed: bool = False
    """GPT-2 keeps its matrices as (in, out)."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts along the output dim: GPT-2 keeps q, k and v in one matrix."""


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


def _rotary_spec(config: Config, **family: Any) -> TransformerSpec:
    """What llama, mistral, qwen2 and qwen3 share; an option left out means what it does in transformers."""
    _require(config, "hidden_act", "silu")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    llama = config["model_type"] == "llama"
    return TransformerSpec(
        family=config["model_type"],
        layers=_count(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        # The other families' defaults are sizes of one particular model, so there it has to be said.
        kv_heads=_count(config, "num_key_value_heads", heads if llama else None),
        head_dim=_count(config, "head_dim", 128 if config["model_type"] == "qwen3" else width // heads),
        ffn=_count(config, "intermediate_size"),
        vocab=_count(config, "vocab_size"),
        context=_count(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_number(rope if "rope_theta" in rope else config, "rope_theta", 10_000.0),
        rope_scaling=_rope_scaling(rope, config),
        **family,
    )


def _rope_scaling(rope: Config, config: Config) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UsageError("partial_rotary_factor: partial rotary positions are not supported")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(rope, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=_number(rope, "factor"),
            low_frequency=_number(rope, "low_freq_factor"),
            high_frequency=_number(rope, "high_freq_factor"),
            original_context=_count(rope, "original_max_position_embeddings"),
        )
    raise UsageError(f"rope_type '{kind}' is not supported: known are default, linear and llama3")


def _llama_spec(config: Config) -> TransformerSpec:
    bias = bool(config.get("attention_bias", False))
    return _rotary_spec(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral_spec(config: Config) -> TransformerSpec:
    unlimited = config.get("sliding_window", 4096) is None
    return _rotary_spec(config, window=None if unlimited else _count(config, "sliding_window", 4096))


def _qwen2_spec(config: Config) -> TransformerSpec:
    _refuse_window(config)
    return _rotary_spec(config, qkv_bias=True)


def _qwen3_spec(config: Config) -> TransformerSpec:
    _refuse_window(config)
    bias = bool(config.get("attention_bias", False))
    return _rotary_spec(config, qk_norm=True, qkv_bias=bias, out_bias=bias)


def _gpt2_spec(config: Config) -> TransformerSpec:
    _require(config, "activation_function", "gelu_new")
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    _require(config, "tie_word_embeddings", True)
    width, heads = _count(config, "n_embd"), _count(config, "n_head")
    if width % heads:
        raise UsageError(f"n_head: {heads} heads do not divide n_embd ({width})")
    return TransformerSpec(
        family="gpt2",
        layers=_count(config, "n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=_count(config, "n_inner", 4 * width),
        vocab=_count(config, "vocab_size"),
        context=_count(config, "n_positions"),
        tied=True,
        norm="layer",
        norm_eps=_number(config, "layer_norm_epsilon", 1e-5),
        positions="learned",
        mlp="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _rotary_config(spec: TransformerSpec) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "default"}
    if spec.rope_scaling is not None:
        scaling = {"rope_type": spec.rope_scaling.kind, "factor": spec.rope_scaling.factor}
        if spec.rope_scaling.kind == "llama3":
            scaling |= {
                "low_freq_factor": spec.rope_scaling.low_frequency,
                "high_freq_factor": spec.rope_scaling.high_frequency,
                "original_max_position_embeddings": spec.rope_scaling.original_context,
            }
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        # transformers 5 reads rope_parameters, transformers 4 the other two.
        "rope_parameters": {"rope_theta": spec.rope_theta, **scaling},
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if spec.rope_scaling is None else scaling,
    }


def _llama_config(spec: TransformerSpec) -> dict[str, Any]:
    return _rotary_config(spec) | {"attention_bias": spec.qkv_bias, "mlp_bias": spec.mlp_bias}


def _mistral_config(spec: TransformerSpec) -> dict[str, Any]:
    return _rotary_config(spec) | {"sliding_window": spec.window}


def _qwen2_config(spec: TransformerSpec) -> dict[str, Any]:
    return _rotary_config(spec) | {"use_sliding_window": False}


def _qwen3_config(spec: TransformerSpec) -> dict[str, Any]:
    return _rotary_config(spec) | {"use_sliding_window": False, "attention_bias": spec.qkv_bias}


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


def _rotary_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
    inside = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        **{f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
        **{f"mlp.{name}.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    }
    if spec.qkv_bias:
        inside |= {f"attention.{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
    if spec.out_bias:
        inside["attention.o.bias"] = "self_attn.o_proj.bias"
    if spec.mlp_bias:
        inside |= {f"mlp.{name}.bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")}
    if spec.qk_norm:
        inside |= {f"attention.{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
    found = {"embed.weight": Foreign("model.embed_tokens.weight")}
    for layer in range(spec.layers):
        found |= {
            f"layers.{layer}.{ours}": Foreign(f"model.layers.{layer}.{theirs}")
            for ours, theirs in inside.items()
        }
    found["norm.weight"] = Foreign("model.norm.weight")
    if not spec.tied:
        found["head.weight"] = Foreign("lm_head.weight")
    return found


def _gpt2_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
    found = {
        "embed.weight": Foreign("transformer.wte.weight"),
        "positions.weight": Foreign("transformer.wpe.weight"),
    }
    for layer in range(spec.layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            matrix = kind == "weight"
            found[f"{ours}.attention_norm.{kind}"] = Foreign(f"{theirs}.ln_1.{kind}")
            for index, name in enumerate("qkv"):
                found[f"{ours}.attention.{name}.{kind}"] = Foreign(
                    f"{theirs}.attn.c_attn.{kind}", matrix, (index, 3)
                )
            found[f"{ours}.attention.o.{kind}"] = Foreign(f"{theirs}.attn.c_proj.{kind}", matrix)
            found[f"{ours}.mlp_norm.{kind}"] = Foreign(f"{theirs}.ln_2.{kind}")
            found[f"{ours}.mlp.up.{kind}"] = Foreign(f"{theirs}.mlp.c_fc.{kind}", matrix)
            found[f"{ours}.mlp.down.{kind}"] = Foreign(f"{theirs}.mlp.c_proj.{kind}", matrix)
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = Foreign(f"transformer.ln_f.{kind}")
    return found


def _count(config: Config, key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = "is missing" if value is None else f"{value!r} should be a positive whole number"
        raise UsageError(f"{key}: {said}: this model cannot be loaded")
    return value


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        said = "is missing" if value is None else f"{value!r} should be a positive number"
        raise UsageError(f"{key}: {said}: this model cannot be loaded")
    return float(value)


def _require(config: Config, key: str, value: Any) -> None:
    if config.get(key, value) != value:
        raise UsageError(
            f"{key}: {config[key]!r} is not supported, only {value!r}: this model cannot be loaded"
        )


def _refuse_window(config: Config) -> None:
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UsageError(
            "use_sliding_window: windows on some layers only are not supported: this model cannot be loaded"
        )


_ROTARY_BUFFERS = (".rotary_emb.inv_freq",)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama_spec, _llama_config, _rotary_tensors, buffers=_ROTARY_BUFFERS),
    "mistral": Family(
        "MistralForCausalLM", _mistral_spec, _mistral_config, _rotary_tensors, buffers=_ROTARY_BUFFERS
    ),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2_spec, _qwen2_config, _rotary_tensors),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3_spec, _qwen3_config, _rotary_tensors),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2_spec,
        _gpt2_config,
        _gpt2_tensors,
        optional_prefix="transformer.",
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
}
