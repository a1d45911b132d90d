"""The exchanges of activations at the borders of a tensor-parallel region, each with its transposed backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.collectives import all_gather, reduce_scatter


class Exchange:
    """What goes into and comes out of a region whose matrices are divided over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup, *, sequence: bool) -> None:
        self.group, self.sequence = group, sequence

    def enter(self, x: Tensor) -> Tensor:
        """All tokens of x (B, T or T / ranks, E); the gradients of the ranks' uses of them are summed."""
        kind = _Gather if self.sequence else _Copy
        whole: Tensor = kind.apply(x, self.group)  # type: ignore[no-untyped-call]
        return whole

    def leave(self, x: Tensor) -> Tensor:
        """The sum over ranks of x (B, T, E): all of it, or under sequence parallelism this rank's T / ranks tokens."""
        kind = _Scatter if self.sequence else _Sum
        own: Tensor = kind.apply(x, self.group)  # type: ignore[no-untyped-call]
        return own

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's part of x (..., T), which needs no gradient."""
        if not self.sequence:
            return x
        return x.chunk(self.group.size(), dim=-1)[self.group.rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter_tokens(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter_tokens(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens(grads[0], ctx.group), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T / ranks, E) of every rank -> (B, T, E)."""
    B, t, E = x.shape
    parts = x.new_empty(group.size() * B, t, E)
    all_gather(parts, x.contiguous(), group=group)
    return parts.view(-1, B, t, E).transpose(0, 1).reshape(B, -1, E)


def _scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, T, E) of every rank -> the sum's (B, T / ranks, E) for this one."""
    B, T, E = x.shape
    t = T // group.size()
    parts = x.reshape(B, -1, t, E).transpose(0, 1).reshape(-1, t, E)
    own = x.new_empty(B, t, E)
    reduce_scatter(own, parts, group=group)
    return own
