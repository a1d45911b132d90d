"""What the config.json of families with experts means: mixtral, qwen3_moe and dots1.

Here every layer has experts. Models with dense layers in between are refused by name.
"""

from __future__ import annotations

from typing import Any

from muster.errors import UsageError
from muster.model.hf_config import Config, count, refuse_window, require, rotary_config, rotary_spec
from muster.model.spec import TransformerSpec


def mixtral_spec(config: Config) -> TransformerSpec:
    """Mixtral (Jiang et al. 2024): softmax over all experts, the chosen ones' scores divided by their sum."""
    return rotary_spec(
        {"rms_norm_eps": 1e-5, "rope_theta": 1e6, **config},
        ffn=0,
        window=None if config.get("sliding_window") is None else count(config, "sliding_window"),
        experts=count(config, "num_local_experts", 8),
        experts_per_token=count(config, "num_experts_per_tok", 2),
        expert_ffn=count(config, "intermediate_size"),
        router_renormalize=True,
    )


def qwen3_moe_spec(config: Config) -> TransformerSpec:
    """Qwen3-MoE (Yang et al. 2025): as qwen3, with a softmax router."""
    refuse_window(config)
    require(config, "decoder_sparse_step", 1)
    _refuse_dense(config, "mlp_only_layers", not config.get("mlp_only_layers"))
    bias = bool(config.get("attention_bias", False))
    # Files of transformers 4 say num_experts, those of transformers 5 num_local_experts.
    experts = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    return rotary_spec(
        config,
        ffn=0,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        experts=count(config, experts),
        experts_per_token=count(config, "num_experts_per_tok", 8),
        expert_ffn=count(config, "moe_intermediate_size"),
        router_renormalize=bool(config.get("norm_topk_prob", False)),
    )


def dots1_spec(config: Config) -> TransformerSpec:
    """dots.llm1 (Huo et al. 2025): sigmoid router with a bias on the choice, and shared experts (DeepSeek-V3's)."""
    refuse_window(config)
    if config.get("sliding_window", 4096) is not None and "layer_types" not in config:
        refused = count(config, "num_hidden_layers") > count(config, "max_window_layers", 62)
        refuse_window({"use_sliding_window": refused})
    for key, value in {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}.items():
        require(config, key, value)
    _refuse_dense(config, "first_k_dense_replace", not config.get("first_k_dense_replace"))
    bias = bool(config.get("attention_bias", False))
    expert_ffn = count(config, "moe_intermediate_size")
    return rotary_spec(
        config,
        ffn=0,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        experts=count(config, "n_routed_experts"),
        experts_per_token=count(config, "num_experts_per_tok"),
        expert_ffn=expert_ffn,
        shared_ffn=expert_ffn * count(config, "n_shared_experts"),
        router="sigmoid",
        router_renormalize=bool(config.get("norm_topk_prob", False)),
        router_bias=True,
    )


def mixtral_config(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {
        "intermediate_size": spec.expert_ffn,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
        "sliding_window": spec.window,
    }


def qwen3_moe_config(spec: TransformerSpec) -> dict[str, Any]:
    return _qwen_like(spec) | {
        "num_experts": spec.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def dots1_config(spec: TransformerSpec) -> dict[str, Any]:
    return _qwen_like(spec) | {
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.expert_ffn,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "sliding_window": None,
    }


def _qwen_like(spec: TransformerSpec) -> dict[str, Any]:
    return rotary_config(spec) | {
        "attention_bias": spec.qkv_bias,
        "intermediate_size": spec.expert_ffn,  # of dense layers, of which there are none
        "moe_intermediate_size": spec.expert_ffn,
        "num_experts_per_tok": spec.experts_per_token,
        "norm_topk_prob": spec.router_renormalize,
    }


def _refuse_dense(config: Config, key: str, all_sparse: bool) -> None:
    if not all_sparse:
        raise UsageError(
            f"{key}: {config[key]!r} is not supported, only layers with experts throughout: this model cannot be loaded"
        )
