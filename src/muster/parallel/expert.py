"""Expert parallelism (Lepikhin et al. 2020): each rank of the expert axis holds some of a layer's experts, whole.

A layer's tokens travel to their experts and back, in two all-to-alls of as many rows as there are:

    rank     rows by expert            rows of own experts, from every rank
    0        a a b c c d    ------>    a a . a b b b           experts a, b
    1        a b b d d      <------    c c d d d               experts c, d

The experts' gradients on a rank are then sums over the whole axis, while other parameters have theirs from a rank's own
tokens. FSDP2 averages both, the experts' over 1 / ranks as many ranks; so that one scale of the loss is right for
both, experts' gradients are divided by the number of ranks (`own_part`).
Shapes: N rows of a rank, M rows that arrive, E embed, X experts, P ranks of the axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muster.model.moe import Experts, MoE, sorting, take

_MATRICES = {"gate": 1, "up": 1, "down": 2}
"""The experts' parameters, and the dim of each that the tensor axis divides (F)."""


def divide(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the experts of a model on the meta device over an expert axis, in place.

    mesh (expert,), or (expert, tensor) where the tensor axis divides each expert's hidden width as well: the
    layer's output is then a sum over that axis.
    """
    group = mesh.get_group(0)
    for moe in layers_of(model):
        for name, dim in _MATRICES.items():
            whole = getattr(moe.experts, name)
            placements = [Shard(0), Shard(dim)][: mesh.ndim]
            # On meta: nothing is sent, and nothing allocated.
            own = distribute_tensor(whole.data, mesh, placements, src_data_rank=None)
            setattr(moe.experts, name, nn.Parameter(own))
        moe.exchange = ExpertExchange(group, len(moe.router.weight))


def layers_of(model: nn.Module) -> Iterable[MoE]:
    """The layers with experts, in order."""
    return (module for module in model.modules() if isinstance(module, MoE))


class ExpertExchange:
    """Runs the rows of this rank through experts wherever they are: the strategy for `MoE.exchange`."""

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        if experts % group.size():
            raise ValueError(f"{experts} experts cannot be divided evenly over {group.size()} ranks")
        self.group, self.ranks = group, group.size()

    def __call__(self, experts: Experts, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (N, E) sorted by expert, counts (X,) int64 of all experts; every rank of the group calls it."""
        send = counts.view(self.ranks, -1)  # (P, X / P): for each rank's experts
        receive = torch.empty_like(send)  # (P, X / P): from each rank, for the experts here
        dist.all_to_all_single(receive, send, group=self.group)
        to_ranks, from_ranks = torch.stack([send.sum(1), receive.sum(1)]).tolist()
        arrived = _exchange(rows, to_ranks, from_ranks, self.group)  # (M, E) by rank, then by expert
        experts_here = torch.arange(receive.shape[1], device=rows.device)
        order, place = sorting(experts_here.repeat(self.ranks).repeat_interleave(receive.flatten()))
        out = experts(take(arrived, order, place, 1), receive.sum(0), self.own_part)
        return _exchange(take(out, place, order, 1), from_ranks, to_ranks, self.group)

    def own_part(self, parameter: Tensor) -> Tensor:
        """What this rank multiplies with: its experts' part of a stacked parameter, plain.

        Its gradient reaches the parameter divided by the ranks of the axis.
        """
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        own: Tensor = _ScaleGradient.apply(local, 1 / self.ranks)  # type: ignore[no-untyped-call]
        return own


def _exchange(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """send[r] of rows (N, E) to each rank r, in order; receive[r] rows from each, in order."""
    arrived: Tensor = _Exchange.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]
    return arrived


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), list(receive), list(send), group=group)
    return arrived


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
