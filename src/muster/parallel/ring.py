"""Ring attention (Liu et al. 2023): queries stay, keys and values travel around the ranks, parts are merged exactly.

A rank holds one chunk from either end of the sequence (`context.chunks`), so under a causal mask every rank has the
same work at every step. No rank ever holds more than two ranks' keys and values: the backward pass sends them around
again, and with them the gradients that the ranks add up. Strategy for `Attention.attend`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muster.model.partial import Outcome, Running, Sight, attend_part_, grad_part_
from muster.parallel.context import chunks


@dataclass(frozen=True, slots=True)
class Ring:
    """Attention of sequences whose tokens are split in chunk pairs over the C >= 2 ranks of `group`."""

    group: dist.ProcessGroup

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, documents: Tensor | None = None, window: int | None = None
    ) -> Tensor:
        """`muster.model.attend.attend` for q (B, H, T/C, D), k and v (B, K, T/C, D), documents (B, T)."""
        out: Tensor = _RingAttention.apply(q, k, v, documents, window, self.group)  # type: ignore[no-untyped-call]
        return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        window: int | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        q, kv = q.contiguous(), torch.stack([k, v])  # (B, H, T/C, D), (2, B, K, T/C, D)
        running = Running(q)
        for held, pairs in _around(kv, documents, window, group):
            for queries, keys, sight in pairs:
                k_part, v_part = held[:, :, :, keys]
                attend_part_(running, queries, q[:, :, queries], k_part, v_part, sight)
        out = running.out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, running.lse, documents)
        ctx.window, ctx.group = window, group
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, kv, out, lse, documents = ctx.saved_tensors
        outcome = Outcome(out, lse, grads[0].contiguous())
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        travelling: _Hop | None = None
        for held, pairs in _around(kv, documents, ctx.window, ctx.group):
            grad_kv = torch.zeros_like(held, dtype=torch.float32)
            for queries, keys, sight in pairs:
                k_part, v_part = held[:, :, :, keys]
                grad_k, grad_v = grad_kv[:, :, :, keys]
                into = (grad_q[:, :, queries], grad_k, grad_v)
                grad_part_(into, outcome.rows(queries), q[:, :, queries], k_part, v_part, sight)
            # What the ranks before added to the gradients of these keys has had this step's time to arrive.
            if travelling is not None:
                grad_kv += travelling.arrived()
                travelling = None  # frees both its buffers before the next hop takes one
            travelling = _Hop(grad_kv, ctx.group)
        assert travelling is not None
        grad_k, grad_v = travelling.arrived().to(kv.dtype)  # the last hop is home
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None


class _Hop:
    """A tensor on its way to the next rank, while the previous rank's is on its way here."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        self._leaving, self._arriving = tensor, torch.empty_like(tensor)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._leaving, group=group, group_peer=(rank + 1) % ranks),
                dist.P2POp(dist.irecv, self._arriving, group=group, group_peer=(rank - 1) % ranks),
            ]
        )

    def arrived(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._arriving


Pair = tuple[slice, slice, Sight]
"""Rows of this rank's queries, rows of the keys at hand, and what the former see of the latter."""


def _around(
    kv: Tensor, documents: Tensor | None, window: int | None, group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, list[Pair]]]:
    """Every rank's keys and values (2, B, K, T/C, D), this rank's first; the next set travels while one is in use."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for step in range(ranks):
        hop = _Hop(kv, group) if step < ranks - 1 else None
        yield kv, _pairs(rank, (rank - step) % ranks, ranks, kv.shape[3] // 2, documents, window)
        if hop is not None:
            kv = hop.arrived()


def _pairs(
    rank: int, source: int, ranks: int, length: int, documents: Tensor | None, window: int | None
) -> list[Pair]:
    """The pairs of chunks of `length` tokens, one of `rank` and one of `source`, where anything is visible."""
    pairs = []
    for i, mine in enumerate(chunks(rank, ranks, "ring")):
        for j, theirs in enumerate(chunks(source, ranks, "ring")):
            ids = None
            if documents is not None:
                ids = (documents[:, _rows(mine, length)], documents[:, _rows(theirs, length)])
            sight = Sight((mine - theirs) * length, window, ids)
            if not sight.sees_nothing(length, length):
                pairs.append((_rows(i, length), _rows(j, length), sight))
    return pairs


def _rows(index: int, length: int) -> slice:
    return slice(index * length, (index + 1) * length)
