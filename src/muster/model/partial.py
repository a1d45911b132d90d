"""Attention over a part of the keys, with the log-sum-exp by which parts merge exactly (Milakov & Gimelshein 2018).

What the softmax over all keys would give is built up part by part: each part's output is weighted by its share of
the sum of exponentials, in fp32. Scores exist for one tile of queries and keys at a time and are computed again in the
backward pass (Dao et al. 2022), so memory does not depend on the number of keys. On GPUs the flash kernels of torch
do the same where they can (`flash.py`). Where the parts come from, and in which order, is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from muster.model import flash

_NEVER = -1e30
"""Log-sum-exp of a query that has seen no key yet: finite, so that differences of two of them are not nan."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Which of a part's keys each query sees: earlier ones, within the window, of its own document."""

    offset: int
    """Position of the first query minus position of the first key."""
    window: int | None = None
    documents: tuple[Tensor, Tensor] | None = None
    """Document ids of the queries (B, T) and of the keys (B, S)."""

    def sees_nothing(self, queries: int, keys: int) -> bool:
        return not self._keys(0, queries, keys)

    def shape(self, queries: int, keys: int) -> Literal["all", "triangle", "other"]:
        """All pairs are visible, those of a square's lower triangle, or something else."""
        if self.documents is not None or (self.window is not None and self.offset + queries > self.window):
            return "other"
        if self.offset >= keys - 1:
            return "all"
        return "triangle" if self.offset == 0 and queries == keys else "other"

    def tiles(self, queries: int, keys: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
        """Rectangles of query rows and key columns that hold every visible pair."""
        # Scores of one tile and head: 0.5 MiB in fp32 stay in a core's cache; a GPU needs larger products.
        rows, columns = (128, 1024) if device.type == "cpu" else (512, 2048)
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            seen = self._keys(start, stop, keys)
            for first in range(seen.start, seen.stop, columns):
                yield slice(start, stop), slice(first, min(first + columns, seen.stop))

    def hide_(self, scores: Tensor, rows: slice, columns: slice) -> None:
        """Set the hidden scores of a tile (B, H, rows, columns) to -inf."""
        nearest = self.offset + rows.start - (columns.stop - 1)
        farthest = self.offset + rows.stop - 1 - columns.start
        if nearest < 0 or (self.window is not None and farthest >= self.window):
            row = torch.arange(rows.start, rows.stop, device=scores.device)[:, None] + self.offset
            distance = row - torch.arange(columns.start, columns.stop, device=scores.device)
            hidden = distance < 0
            if self.window is not None:
                hidden |= distance >= self.window
            scores.masked_fill_(hidden, -math.inf)
        if self.documents is not None:
            queries, keys = self.documents
            other = queries[:, rows, None] != keys[:, None, columns]  # (B, rows, columns)
            scores.masked_fill_(other[:, None], -math.inf)

    def _keys(self, start: int, stop: int, keys: int) -> range:
        """The keys that any of the queries start..stop-1 may see."""
        first = 0 if self.window is None else max(self.offset + start - self.window + 1, 0)
        return range(first, min(self.offset + stop, keys))


class Running:
    """The attention of q's shape (B, H, T, D) over the keys seen so far: `out` in fp32 and its `lse` (B, H, T)."""

    def __init__(self, q: Tensor) -> None:
        self.out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        self.lse = self.out.new_full(q.shape[:-1], _NEVER)

    def merge_(self, out: Tensor, lse: Tensor, queries: slice) -> None:
        """Take in the attention of `queries` over other keys: out (B, H, rows, D), lse (B, H, rows), both fp32."""
        ours, ours_lse = self.out[:, :, queries], self.lse[:, :, queries]
        total = torch.logaddexp(ours_lse, lse)
        ours.mul_((ours_lse - total).exp_()[..., None]).add_(out.mul_((lse - total).exp_()[..., None]))
        ours_lse.copy_(total)


def attend_part_(running: Running, queries: slice, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> None:
    """Merge into `running` the attention of its rows `queries`, q (B, H, T, D), over k, v (B, K, S, D)."""
    shape = sight.shape(q.shape[2], k.shape[2])
    if shape != "other" and flash.fits(q, k):
        out, lse = flash.forward(q, k, v, is_causal=shape == "triangle")
        running.merge_(out.float(), lse, queries)
        return
    B, H, T, D = q.shape
    S = k.shape[2]
    for rows, columns in sight.tiles(T, S, q.device):
        block = _stacked(q[:, :, rows], k)  # (B*K, G*rows, D)
        keys, values = (x[:, :, columns].flatten(0, 1) for x in (k, v))  # (B*K, columns, D)
        scores = _scores(block, keys, (B, H), rows, columns, sight).float()
        highest = scores.amax(-1, keepdim=True).clamp_min_(_NEVER)
        weights = scores.sub_(highest).exp_()
        # The highest score has weight 1: only a row that sees nothing here sums to less, to 0.
        total = weights.sum(-1, keepdim=True).clamp_min_(1)
        out = torch.bmm(weights.to(v.dtype), values).float().div_(total)
        lse = highest.add_(total.log_())
        here = slice(queries.start + rows.start, queries.start + rows.stop)
        running.merge_(out.view(B, H, -1, D), lse.view(B, H, -1), here)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What backward knows of some queries: final `out` (B, H, T, D) and `lse` (B, H, T), and the gradient of `out`."""

    out: Tensor
    lse: Tensor
    grad: Tensor

    def rows(self, queries: slice) -> Outcome:
        return Outcome(self.out[:, :, queries], self.lse[:, :, queries], self.grad[:, :, queries])


def grad_part_(
    grads: tuple[Tensor, Tensor, Tensor], outcome: Outcome, q: Tensor, k: Tensor, v: Tensor, sight: Sight
) -> None:
    """Add to grads, fp32 and shaped like q, k and v, what this part of the keys contributes to them."""
    shape = sight.shape(q.shape[2], k.shape[2])
    if shape != "other" and flash.fits(q, k):
        known = (outcome.out, outcome.lse)
        parts = flash.backward(outcome.grad, q, k, v, *known, is_causal=shape == "triangle")
        for grad, part in zip(grads, parts, strict=True):
            grad.add_(part)
        return
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    scale = 1 / math.sqrt(D)
    grad_q, grad_k, grad_v = grads
    # The softmax's own backward needs sum over *all* keys of p * dp, which is the output's product with its gradient.
    shared = (outcome.out.float() * outcome.grad).sum(-1, keepdim=True)  # (B, H, T, 1)
    for rows, columns in sight.tiles(T, S, q.device):
        block, grad_out = _stacked(q[:, :, rows], k), _stacked(outcome.grad[:, :, rows], k)
        keys, values = (x[:, :, columns].flatten(0, 1) for x in (k, v))
        scores = _scores(block, keys, (B, H), rows, columns, sight)
        p = torch.sub(
            scores, _stacked(outcome.lse[:, :, rows, None], k)
        ).exp_()  # fp32, as the log-sum-exp is
        grad_p = torch.bmm(grad_out, values.transpose(1, 2))
        grad_s = torch.sub(grad_p, _stacked(shared[:, :, rows], k)).mul_(p).to(q.dtype)
        p = p.to(q.dtype)
        grad_q[:, :, rows].add_(torch.bmm(grad_s, keys).view(B, H, -1, D), alpha=scale)
        grad_k[:, :, columns].add_(torch.bmm(grad_s.transpose(1, 2), block).view(B, K, -1, D), alpha=scale)
        grad_v[:, :, columns].add_(torch.bmm(p.transpose(1, 2), grad_out).view(B, K, -1, D))


def _stacked(x: Tensor, k: Tensor) -> Tensor:
    """Query heads that share a kv head as more rows of it: (B, H, rows, D) -> (B*K, G*rows, D)."""
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _scores(
    block: Tensor, keys: Tensor, heads: tuple[int, int], rows: slice, columns: slice, sight: Sight
) -> Tensor:
    """Scaled scores of a tile, hidden ones -inf: (B*K, G*rows, columns) in the dtype of the queries."""
    scores = block.new_empty(*block.shape[:2], keys.shape[1])
    torch.baddbmm(
        scores, block, keys.transpose(1, 2), beta=0, alpha=1 / math.sqrt(block.shape[-1]), out=scores
    )
    sight.hide_(scores.view(*heads, rows.stop - rows.start, -1), rows, columns)
    return scores
