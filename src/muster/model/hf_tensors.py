"""What our parameters are called in Hugging Face files, and how they are laid out there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from muster.model.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class Foreign:
    """Where one of our tensors is found in a Hugging Face file."""

    name: str
    """Its name there; where several make up ours, {} stands for their numbers."""
    transposed: bool = False
    """GPT-2 keeps its matrices as (in, out)."""
    part: tuple[int, int] = (0, 1)
    """Which of how many equal parts along the output dim: GPT-2 keeps q, k and v in one matrix."""
    stacked: int = 0
    """How many of theirs make up ours along a new first dim: experts are kept one by one. 0: it is one of theirs."""

    @property
    def names(self) -> list[str]:
        """Theirs, in the order in which they make up ours."""
        return [self.name.format(index) for index in range(self.stacked)] if self.stacked else [self.name]


def rotary_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
    """Names that llama, mistral, qwen2 and qwen3 share."""
    mlp = {f"mlp.{name}.weight": Foreign(f"mlp.{name}_proj.weight") for name in _SWIGLU}
    if spec.mlp_bias:
        mlp |= {f"mlp.{name}.bias": Foreign(f"mlp.{name}_proj.bias") for name in _SWIGLU}
    return _model(spec, mlp)


def mixtral_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
    experts = {
        f"mlp.experts.{ours}": Foreign(f"block_sparse_moe.experts.{{}}.{theirs}.weight", stacked=spec.experts)
        for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items()
    }
    return _model(spec, {"mlp.router.weight": Foreign("block_sparse_moe.gate.weight")} | experts)


def qwen_moe_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
    """Names that qwen3_moe and dots1 share."""
    mlp = {"mlp.router.weight": Foreign("mlp.gate.weight")}
    if spec.router_bias:
        mlp["mlp.router.bias"] = Foreign("mlp.gate.e_score_correction_bias")
    for name in _SWIGLU:
        mlp[f"mlp.experts.{name}"] = Foreign(f"mlp.experts.{{}}.{name}_proj.weight", stacked=spec.experts)
        if spec.shared_ffn:
            mlp[f"mlp.shared.{name}.weight"] = Foreign(f"mlp.shared_experts.{name}_proj.weight")
    return _model(spec, mlp)


def gpt2_tensors(spec: TransformerSpec) -> dict[str, Foreign]:
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


_SWIGLU = ("gate", "up", "down")


def _model(spec: TransformerSpec, mlp: dict[str, Foreign]) -> dict[str, Foreign]:
    """A rotary model whose feed-forward blocks are found as `mlp` says, relative to a layer."""
    inside = _attention(spec) | mlp
    found = {"embed.weight": Foreign("model.embed_tokens.weight")}
    for layer in range(spec.layers):
        found |= {
            f"layers.{layer}.{ours}": replace(theirs, name=f"model.layers.{layer}.{theirs.name}")
            for ours, theirs in inside.items()
        }
    found["norm.weight"] = Foreign("model.norm.weight")
    if not spec.tied:
        found["head.weight"] = Foreign("lm_head.weight")
    return found


def _attention(spec: TransformerSpec) -> dict[str, Foreign]:
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        **{f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    }
    if spec.qkv_bias:
        names |= {f"attention.{name}.bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
    if spec.out_bias:
        names["attention.o.bias"] = "self_attn.o_proj.bias"
    if spec.qk_norm:
        names |= {f"attention.{name}_norm.weight": f"self_attn.{name}_norm.weight" for name in "qk"}
    return {ours: Foreign(theirs) for ours, theirs in names.items()}
