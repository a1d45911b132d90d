"""What operations have to know besides tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from muster.model.spec import TransformerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The columns of a row of qkv: H * D of queries, K * D of keys, K * D of values."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.dim


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """RMSNorm of each head's queries and keys before they are rotated."""

    q: Tensor
    """(D,) fp32."""
    k: Tensor
    eps: float


KV = Literal["int8"]
"""A format of keys and values other than that of the activations."""

SCALE_BYTES = 4


def row_bytes(dim: int, number_bytes: int, kv: KV | None) -> int:
    """Of one token's key or value of one head, in the cache's pages."""
    return dim * number_bytes if kv is None else dim + SCALE_BYTES


Rotation = tuple["Tensor", "Tensor"]
"""Cosines and sines (N, D) fp32 of the new tokens; the halves of D are the same."""


Linear = Callable[["Tensor"], "Tensor"]
"""What `Kernels.linear` returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A layer of attention and SwiGLU with RMSNorms."""

    attention_norm: Tensor
    """(E,) fp32."""
    mlp_norm: Tensor
    qk_norm: QKNorm | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> Sequence[Linear]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, kw_only=True, slots=True)
class Trunk:
    """What `Kernels.stack` makes one call of: layers, and where it is all here what stands before and behind them."""

    spec: TransformerSpec
    """With rotary positions; sizes are those of what is here."""
    heads: Heads
    blocks: Sequence[Block]
    embed: Tensor | None
    """(V, E)."""
    norm: Tensor | None
    """(E,) fp32."""
    head: Linear | None
