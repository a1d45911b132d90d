"""Ulysses (Jacobs et al. 2023): ranks trade their tokens of all heads for all tokens of their heads, and back.

Between the two all-to-alls every rank runs the ordinary attention on whole sequences. Strategy for `Attention.attend`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muster.model.attend import attend


@dataclass(frozen=True, slots=True)
class Ulysses:
    """Attention of sequences whose tokens are split in runs over the C ranks of `group`; H % C == 0."""

    group: dist.ProcessGroup

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """`muster.model.attend.attend` for q (B, H, T/C, D), k and v (B, K, T/C, D), documents (B, T)."""
        C, K = dist.get_world_size(self.group), k.shape[1]
        # As many kv heads as C divides. lcm(K, C) divides H because both do, so the groups of heads stay whole.
        copies = math.lcm(K, C) // K
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        q, k, v = self._trade_tokens_for_heads(q, k, v)
        return self._trade_heads_for_tokens(attend(q, k, v, documents=documents, window=window))

    def _trade_tokens_for_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, heads, T/C, D) -> (B, heads/C, T, D), all in one all-to-all."""
        B, _, t, D = tensors[0].shape
        C = dist.get_world_size(self.group)
        parts = [x.reshape(B, C, -1, t, D).movedim(1, 0) for x in tensors]  # (C, B, heads/C, T/C, D)
        received: Tensor = _AllToAll.apply(torch.cat(parts, 2), self.group)  # type: ignore[no-untyped-call]
        mine = torch.split(received, [part.shape[2] for part in parts], 2)
        return tuple(x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in mine)

    def _trade_heads_for_tokens(self, x: Tensor) -> Tensor:
        """(B, H/C, T, D) -> (B, H, T/C, D)."""
        B, H, T, D = x.shape
        C = dist.get_world_size(self.group)
        parts = x.reshape(B, H, C, T // C, D).movedim(2, 0).contiguous()  # (C, B, H/C, T/C, D)
        received: Tensor = _AllToAll.apply(parts, self.group)  # type: ignore[no-untyped-call]
        return received.movedim(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """x[i] of rank j becomes x[j] of rank i; which is its own transpose, so gradients go the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0].contiguous(), ctx.group), None


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
