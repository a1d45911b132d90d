"""softmax(q k^T / sqrt(D)) v under a causal mask, a sliding window and document borders: which kernel runs.

    GPU                                  scaled_dot_product_attention (flash where no mask is needed)
    CPU, training, T <= 2048             blocks of plain matrix products (`blocked.py`)
    CPU, longer, documents or window     tiles (`partial.py`): no mask of T x T
    CPU otherwise, cached decoding       scaled_dot_product_attention

The blocks keep their probabilities for the backward pass, T^2/2 for each head. Beyond the limit that costs more
memory than the gain is worth: 1.06x in fp32 at 4,096 tokens (`benchmarks/attention_cpu.py`).
The tiles were measured once, at T = 4096 with eight documents in fp32: 227 ms against 1027 ms.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from muster.model import blocks
from muster.model.blocked import BlockedAttention
from muster.model.partial import TiledAttention


class Attend(Protocol):
    """What a block calls for its causal self-attention: `attend`, or one that works across ranks."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, window: int | None = None
    ) -> Tensor: ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Causal self-attention of q (B, H, T, D) over k, v (B, K, T, D); returns (B, H, T, D).

    documents (B, T): a query sees only keys of its own document. window: only the last `window` keys.
    """
    T = q.shape[2]
    if window is not None and window >= T:
        window = None
    if _is_blocked(T, q.device.type) and torch.is_grad_enabled():
        out: Tensor = BlockedAttention.apply(q, k, v, documents, window)  # type: ignore[no-untyped-call]
        return out
    if q.device.type == "cpu" and T > blocks.MAX_TOKENS and (documents is not None or window is not None):
        tiled: Tensor = TiledAttention.apply(q, k, v, documents, window)  # type: ignore[no-untyped-call]
        return tiled
    if documents is None and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    position = torch.arange(T, device=q.device)
    seen = visible(position, position, window)[None]  # (1, T, T)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)


def training_kernel(tokens: int, device: str) -> tuple[str, str]:
    """What runs attention in training on sequences of `tokens`, on a device type, and why."""
    if _is_blocked(tokens, device):
        # At 512 tokens and heads of 64: benchmarks/results/attention_cpu.json
        gain = "2.8x as fast as scaled_dot_product_attention in bf16 and 1.4x in fp32 at 512 tokens"
        return "blocks of matrix products", f"measured on CPU: {gain}"
    if device == "cpu":
        reason = (
            f"beyond {blocks.MAX_TOKENS} tokens, blocks take too much memory; tiles where a mask is needed"
        )
        return "scaled_dot_product_attention", reason
    return "scaled_dot_product_attention", "the flash kernel of a GPU"


def _is_blocked(tokens: int, device: str) -> bool:
    return device == "cpu" and tokens <= blocks.MAX_TOKENS


def attend_cached(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, window: int | None = None) -> Tensor:
    """Attention of new tokens q (B, H, T, D) at `positions` (B, T) over cached k, v (B, K, S, D)."""
    seen = visible(positions, torch.arange(k.shape[2], device=q.device), window)  # (B, T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which keys (S,) each query (..., T) may see, by position: (..., T, S) booleans."""
    distance = queries[..., :, None] - keys
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
