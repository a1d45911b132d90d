"""Reading and writing the entries of a Hugging Face config.json, and those that the rotary families share.

Knows no family as a whole: `families.py` and `families_moe.py` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muster.errors import UsageError
from muster.model.spec import RopeScaling, TransformerSpec

Config = Mapping[str, Any]


def rotary_spec(config: Config, *, ffn: int | None = None, **family: Any) -> TransformerSpec:
    """What every family but gpt2 shares; an option left out means what it does in transformers.

    `ffn` where intermediate_size does not say it.
    """
    require(config, "hidden_act", "silu")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    llama = config["model_type"] == "llama"
    return TransformerSpec(
        family=config["model_type"],
        layers=count(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        # The other families' defaults are sizes of one particular model, so there it has to be said.
        kv_heads=count(config, "num_key_value_heads", heads if llama else None),
        head_dim=count(config, "head_dim", 128 if config["model_type"] == "qwen3" else width // heads),
        ffn=count(config, "intermediate_size") if ffn is None else ffn,
        vocab=count(config, "vocab_size"),
        context=count(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", False)),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=number(rope if "rope_theta" in rope else config, "rope_theta", 10_000.0),
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
        return RopeScaling(kind="linear", factor=number(rope, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=number(rope, "factor"),
            low_frequency=number(rope, "low_freq_factor"),
            high_frequency=number(rope, "high_freq_factor"),
            original_context=count(rope, "original_max_position_embeddings"),
        )
    raise UsageError(f"rope_type '{kind}' is not supported: known are default, linear and llama3")


def rotary_config(spec: TransformerSpec) -> dict[str, Any]:
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


def count(config: Config, key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        said = "is missing" if value is None else f"{value!r} should be a positive whole number"
        raise UsageError(f"{key}: {said}: this model cannot be loaded")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        said = "is missing" if value is None else f"{value!r} should be a positive number"
        raise UsageError(f"{key}: {said}: this model cannot be loaded")
    return float(value)


def require(config: Config, key: str, value: Any) -> None:
    if config.get(key, value) != value:
        raise UsageError(
            f"{key}: {config[key]!r} is not supported, only {value!r}: this model cannot be loaded"
        )


def refuse_window(config: Config) -> None:
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise UsageError(
            "use_sliding_window: windows on some layers only are not supported: this model cannot be loaded"
        )
