"""What the arguments in a Megatron-LM checkpoint say of its model, in our terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from muster.errors import UsageError
from muster.model.spec import RopeScaling, TransformerSpec

Arguments = Mapping[str, Any]

# Options that change the numbers and that the transformer here does not have; with the values it can do.
_ONLY: dict[str, tuple[Any, ...]] = {
    "num_experts": (None, 0),
    "multi_latent_attention": (None, False),
    "apply_layernorm_1p": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "rotary_interleaved": (None, False),
    "rotary_percent": (None, 1, 1.0),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "squared_relu": (None, False),
    "quick_geglu": (None, False),
    "window_size": (None,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
}


def spec_of_arguments(arguments: Arguments) -> TransformerSpec:
    """The specification; UsageError names an option that cannot be represented.

    The vocabulary is the one before padding where Megatron says it, else the padded one.
    """
    for key, values in _ONLY.items():
        if arguments.get(key) not in values:
            raise UsageError(
                f"Megatron-LM's {key}: {arguments[key]!r} is not supported: this model cannot be converted"
            )
    heads, width = _count(arguments, "num_attention_heads"), _count(arguments, "hidden_size")
    grouped = bool(arguments.get("group_query_attention"))
    sizes: dict[str, Any] = {
        "layers": _count(arguments, "num_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": _count(arguments, "num_query_groups") if grouped else heads,
        "head_dim": _count(arguments, "kv_channels", width // heads),
        "ffn": _count(arguments, "ffn_hidden_size"),
        "vocab": _count(arguments, "vocab_size", arguments.get("padded_vocab_size")),
        "context": _count(arguments, "max_position_embeddings", arguments.get("seq_length")),
        "tied": not arguments.get("untie_embeddings_and_output_weights"),
        "norm_eps": float(arguments.get("norm_epsilon") or arguments.get("layernorm_epsilon") or 1e-5),
    }
    bias = bool(arguments.get("add_bias_linear", True))
    kind = (
        arguments.get("normalization", "LayerNorm"),
        arguments.get("position_embedding_type", "learned_absolute"),
        bool(arguments.get("swiglu")),
    )
    if kind == ("LayerNorm", "learned_absolute", False) and bias and not grouped and sizes["tied"]:
        if not (arguments.get("bias_gelu_fusion", True) or arguments.get("openai_gelu")):
            raise UsageError(
                "Megatron-LM's exact gelu is not supported, only GPT-2's: this model cannot be converted"
            )
        return _gpt2(sizes)
    if kind != ("RMSNorm", "rope", True):
        raise UsageError(
            f"Megatron-LM's normalization {kind[0]}, position_embedding_type {kind[1]} and swiglu {kind[2]} are "
            f"together no family here (RMSNorm, rope and swiglu; or GPT-2's): this model cannot be converted"
        )
    qk_norm, qkv_bias = bool(arguments.get("qk_layernorm")), bias or bool(arguments.get("add_qkv_bias"))
    family = "qwen3" if qk_norm else "qwen2" if qkv_bias and not bias else "llama"
    return TransformerSpec(
        family=family,
        rope_theta=float(arguments.get("rotary_base") or 10_000),
        rope_scaling=_scaling(arguments),
        qkv_bias=qkv_bias,
        out_bias=bias,
        mlp_bias=bias,
        qk_norm=qk_norm,
        **sizes,
    )


def _gpt2(sizes: dict[str, Any]) -> TransformerSpec:
    return TransformerSpec(
        family="gpt2", norm="layer", positions="learned", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True,
        **sizes,
    )  # fmt: skip


def _scaling(arguments: Arguments) -> RopeScaling | None:
    if not arguments.get("use_rope_scaling"):
        return None
    return RopeScaling(kind="llama3", factor=float(arguments.get("rope_scaling_factor") or 8.0))


def _count(arguments: Arguments, key: str, default: Any = None) -> int:
    value = arguments.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(
            f"Megatron-LM's {key} is {value!r} instead of a positive number: this model cannot be converted"
        )
    return value
