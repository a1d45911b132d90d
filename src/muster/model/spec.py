"""What a transformer is made of, as plain data, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Stretches rotary frequencies beyond the trained context.

    linear divides every frequency by `factor` (Chen et al. 2023); llama3 divides only those whose
    wavelength exceeds the original context, with a smooth transition (Llama 3.1, 2024).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """Shape and options of a decoder-only transformer."""

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tied: bool
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    """Sliding attention window in tokens: a query sees itself and the window - 1 tokens before it."""
    experts: int = 0
    """Experts X of every layer, in place of its dense feed-forward block (`ffn` is 0 then); 0 for none."""
    experts_per_token: int = 0
    expert_ffn: int = 0
    """Hidden width F of one expert."""
    shared_ffn: int = 0
    """Hidden width of the experts that see every token, all together; 0 for none."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits: softmax over the experts, or sigmoid of each."""
    router_renormalize: bool = False
    """The chosen experts' scores are divided by their sum."""
    router_bias: bool = False
    """The choice (not the weight) of an expert adds a bias that balances the load without a loss."""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TransformerSpec:
        """What `dataclasses.asdict` of a specification gave."""
        scaling = plain["rope_scaling"]
        return cls(**{**plain, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})

    @property
    def embedding_parameters(self) -> int:
        """Parameters that are looked up rather than multiplied with."""
        learned = self.context * self.width if self.positions == "learned" else 0
        return learned + (0 if self.tied else self.vocab * self.width)

    def parameters(self) -> int:
        """Number of parameters; a tied head is counted once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.width * (q + 2 * kv) + q * self.width
        attention += (
            (q + 2 * kv) * self.qkv_bias + self.width * self.out_bias + 2 * self.head_dim * self.qk_norm
        )
        matrices = 3 if self.mlp == "swiglu" else 2
        mlp = matrices * self.width * (self.ffn + self.experts * self.expert_ffn + self.shared_ffn)
        mlp += ((matrices - 1) * self.ffn + self.width) * self.mlp_bias + self.experts * self.width
        norm = self.width * (2 if self.norm == "layer" else 1)
        table = self.vocab * self.width
        learned = self.context * self.width if self.positions == "learned" else 0
        return self.layers * (attention + mlp + 2 * norm) + norm + table * (1 if self.tied else 2) + learned

    def flops_per_token(self, sequence: int) -> float:
        """Floating-point operations of training on one token: 6 for each multiplied parameter, and causal
        attention's 6 L T H D (forward and backward, the masked half not counted; Chowdhery et al. 2022).
        Of the experts only those that a token is sent to count.
        """
        idle = self.layers * (self.experts - self.experts_per_token) * 3 * self.width * self.expert_ffn
        multiplied = self.parameters() - self.embedding_parameters - idle
        window = min(self.window or sequence, sequence)
        # Twice the keys that a query sees on average: T without a window, almost 2 W under a short one.
        keys = window * (2 - window / sequence)
        return 6.0 * multiplied + 6.0 * self.layers * keys * self.heads * self.head_dim
