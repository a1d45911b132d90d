"""The global gradient norm, clipping, and the search for the parameter whose gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from muster.parallel.world import World

Named = Sequence[tuple[str, nn.Parameter]]
"""This rank's parameters, each once, by the undivided model's names."""


def squared_norm(named: Named, copies_apart: int = 1) -> float:
    """This rank's share of the squared 2-norm of all gradients: the shares of all ranks sum to it.

    `copies_apart`: copies of each gradient that its placements do not tell of.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for _, parameter in named:
        if parameter.grad is not None:
            by_copies.setdefault(_copies(parameter.grad), []).append(_local(parameter.grad))
    return sum(
        float(torch.stack(torch._foreach_norm(gradients)).double().square().sum()) / (copies * copies_apart)
        for copies, gradients in by_copies.items()
    )


@torch.no_grad()
def clip(named: Named, norm: float, limit: float) -> None:
    """Scale the gradients so that their norm is at most `limit` (Pascanu et al. 2013)."""
    if norm > limit:
        gradients = [_local(p.grad) for _, p in named if p.grad is not None]
        torch._foreach_mul_(gradients, limit / norm)


def shards(named: Named) -> list[Tensor]:
    """This rank's part of every gradient, to be changed in place; zeros where there was none."""
    for _, parameter in named:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [_local(parameter.grad) for _, parameter in named if parameter.grad is not None]


@torch.no_grad()
def scale(named: Named, factor: float) -> None:
    if factor != 1:
        torch._foreach_mul_(shards(named), factor)


def forget(named: Named) -> None:
    for _, parameter in named:
        parameter.grad = None


def where_not_finite(named: Named, all_names: Sequence[str], world: World, loss: float) -> str:
    """The first parameter whose gradient holds a nan or inf, and the ranks that hold it; all of `world` must call.

    `all_names` are the undivided model's, of which a pipeline rank has some; `loss` is this rank's share of it,
    which tells of the rank that it came from where the gradients are summed over many.
    """
    places = {name: index for index, name in enumerate(all_names)}
    found = [(places[name], _local(p.grad)) for name, p in named if p.grad is not None]
    bad = [place for place, grad in found if not bool(torch.isfinite(grad).all())]
    first = torch.tensor(min(bad, default=len(all_names)), device=world.device)
    if world.size > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=world.group)
    holders, origins = _who(int(first) in bad, world), _who(not math.isfinite(loss), world)
    came = f", and the loss on {origins}" if origins else ""
    if not holders:
        return f"no gradient: only their norm overflowed{came}"
    return f"{all_names[int(first)]} on {holders}{came}"


def _who(own: bool, world: World) -> str:
    """The ranks on which something is so."""
    found = world.sum(*(own and rank == world.rank for rank in range(world.size)))
    ranks = [str(world.members[rank]) for rank, is_so in enumerate(found) if is_so]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks) if ranks else ""


def _copies(tensor: Tensor) -> int:
    """How many ranks hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
