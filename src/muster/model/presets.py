"""Published sizes by name, typed from the models' public config.json files."""

from __future__ import annotations

from dataclasses import replace

from muster.model.spec import RopeScaling, TransformerSpec

_LLAMA31 = RopeScaling(kind="llama3", factor=8.0)
_LLAMA32 = RopeScaling(kind="llama3", factor=32.0)


def _llama(layers: int, width: int, heads: int, kv_heads: int, ffn: int, **rest: object) -> TransformerSpec:
    spec = TransformerSpec(
        family="llama", layers=layers, width=width, heads=heads, kv_heads=kv_heads, head_dim=width // heads,
        ffn=ffn, vocab=32_000, context=4096, tied=False,
    )  # fmt: skip
    return replace(spec, **rest)  # type: ignore[arg-type]


def _llama3(layers: int, width: int, heads: int, ffn: int, **rest: object) -> TransformerSpec:
    common: dict[str, object] = {"vocab": 128_256, "context": 8192, "rope_theta": 500_000.0}
    return _llama(layers, width, heads, 8, ffn, **(common | rest))


def _qwen2(
    layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool
) -> TransformerSpec:
    return _llama(
        layers, width, heads, kv_heads, ffn, family="qwen2", vocab=vocab, context=32_768, tied=tied,
        norm_eps=1e-6, rope_theta=1e6, qkv_bias=True,
    )  # fmt: skip


def _qwen3(layers: int, width: int, heads: int, ffn: int, tied: bool) -> TransformerSpec:
    return _llama(
        layers, width, heads, 8, ffn, family="qwen3", head_dim=128, vocab=151_936, context=40_960, tied=tied,
        norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
    )  # fmt: skip


def _mixtral(
    layers: int, width: int, heads: int, kv_heads: int, expert_ffn: int, **rest: object
) -> TransformerSpec:
    return _llama(
        layers, width, heads, kv_heads, 0, family="mixtral", experts=8, experts_per_token=2, expert_ffn=expert_ffn,
        router_renormalize=True, rope_theta=1e6, **rest,
    )  # fmt: skip


def _qwen3_moe(
    layers: int, width: int, heads: int, kv_heads: int, experts: int, expert_ffn: int
) -> TransformerSpec:
    return replace(
        _qwen3(layers, width, heads, 0, tied=False), family="qwen3_moe", kv_heads=kv_heads, experts=experts,
        experts_per_token=8, expert_ffn=expert_ffn, router_renormalize=True,
    )  # fmt: skip


def _gpt2(layers: int, width: int, heads: int) -> TransformerSpec:
    return _llama(
        layers, width, heads, heads, 4 * width, family="gpt2", vocab=50_257, context=1024, tied=True,
        norm="layer", positions="learned", mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


PRESETS: dict[str, TransformerSpec] = {
    "llama-2-7b": _llama(32, 4096, 32, 32, 11_008),
    "llama-3-8b": _llama3(32, 4096, 32, 14_336),
    "llama-3-70b": _llama3(80, 8192, 64, 28_672),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14_336, context=131_072, rope_scaling=_LLAMA31),
    "llama-3.1-405b": _llama3(126, 16_384, 128, 53_248, context=131_072, rope_scaling=_LLAMA31),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, context=131_072, rope_scaling=_LLAMA32, tied=True),
    "llama-3.2-3b": _llama3(28, 3072, 24, 8192, context=131_072, rope_scaling=_LLAMA32, tied=True),
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, family="mistral", context=32_768, window=4096),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 8, 14_336, context=32_768),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 151_936, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18_944, 152_064, tied=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, tied=False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 4, 128, 768),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
}
