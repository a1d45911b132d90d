"""Causal attention in blocks of query rows, as plain matrix products: the fast path on CPU.

torch's CPU flash attention is bound by its scalar bf16 conversions; the products here run on
the processor's matrix kernels instead. Going block by block skips the keys that the causal
mask (or a sliding window) hides, and query heads that share a key/value head are stacked as
rows, so keys and values are never repeated. The probabilities are kept for the backward
pass: T^2/2 for each head, which `attend.py` bounds by using this for moderate T only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from muster.model.blocks import block as block_of
from muster.model.blocks import rows as rows_of


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v for q (B, H, T, D) and k, v (B, K, T, D); returns (B, H, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None
    ) -> Tensor:
        B, H, T, D = q.shape
        K = k.shape[1]
        scale = 1 / math.sqrt(D)
        rows = q.reshape(B * K, H // K, T, D)
        k, v = k.reshape(B * K, T, D), v.reshape(B * K, T, D)
        out = torch.empty_like(rows)
        kept = []
        for start in range(0, T, rows_of(T)):
            queries, keys = block_of(start, T, window)
            block = rows[:, :, queries].reshape(B * K, -1, D)  # (B*K, G*rows, D)
            scores = block.new_empty(B * K, block.shape[1], keys.stop - keys.start)
            torch.baddbmm(scores, block, k[:, keys].transpose(1, 2), beta=0, alpha=scale, out=scores)
            _mask_(scores.view(B, H, queries.stop - queries.start, -1), queries, keys, documents, window)
            probabilities = torch.softmax(scores, -1)
            out[:, :, queries] = torch.bmm(probabilities, v[:, keys]).view(B * K, H // K, -1, D)
            kept.append(probabilities)
        ctx.save_for_backward(rows, k, v, *kept)
        ctx.window, ctx.shape = window, (B, H, T, D)
        return out.view(B, H, T, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, k, v, *kept = ctx.saved_tensors
        B, H, T, D = ctx.shape
        K = k.shape[0] // B
        scale = 1 / math.sqrt(D)
        grad = grads[0].reshape(rows.shape)
        grad_q, grad_k, grad_v = torch.empty_like(rows), torch.zeros_like(k), torch.zeros_like(v)
        for start, probabilities in zip(range(0, T, rows_of(T)), kept, strict=True):
            queries, keys = block_of(start, T, ctx.window)
            block = rows[:, :, queries].reshape(B * K, -1, D)
            grad_out = grad[:, :, queries].reshape(block.shape)
            grad_v[:, keys].baddbmm_(probabilities.transpose(1, 2), grad_out)
            grad_p = torch.bmm(grad_out, v[:, keys].transpose(1, 2))
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, probabilities.dtype)
            grad_q[:, :, queries] = torch.bmm(grad_s, k[:, keys]).mul_(scale).view(B * K, H // K, -1, D)
            grad_k[:, keys].baddbmm_(grad_s.transpose(1, 2), block, alpha=scale)
        return grad_q.view(B, H, T, D), grad_k.view(B, K, T, D), grad_v.view(B, K, T, D), None, None


def _mask_(scores: Tensor, queries: slice, keys: slice, documents: Tensor | None, window: int | None) -> None:
    """Set hidden scores (B, H, rows, columns) to -inf: later keys, those before the window, other texts."""
    hidden = float("-inf")
    # Later keys occur only from the block's own start on.
    diagonal = scores[..., queries.start - keys.start :]
    later = torch.ones(diagonal.shape[-2:], dtype=torch.bool).triu_(1)
    diagonal.masked_fill_(later, hidden)
    if window is not None:
        row = torch.arange(queries.start, queries.stop)[:, None]
        column = torch.arange(keys.start, keys.stop)
        scores.masked_fill_(column <= row - window, hidden)
    if documents is not None:
        other = documents[:, queries, None] != documents[:, None, keys]  # (B, rows, columns)
        scores.masked_fill_(other[:, None], hidden)
