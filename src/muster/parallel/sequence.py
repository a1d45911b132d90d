"""Splitting the tokens of whole sequences over the context axis, and putting them together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from muster.parallel.context import Kind, chunk_count, chunks


def split(x: Tensor, dim: int, *, rank: int, ranks: int, kind: Kind) -> Tensor:
    """A rank's part of x: `dim` holds T tokens in x, T / ranks in the part. T must divide, see `problems`."""
    pieces = x.chunk(chunk_count(ranks, kind), dim)
    return torch.cat([pieces[chunk] for chunk in chunks(rank, ranks, kind)], dim)


def unsplit(parts: list[Tensor], dim: int, *, kind: Kind) -> Tensor:
    """The whole that `split` gave these parts of, in the order of ranks."""
    ranks = len(parts)
    pieces: dict[int, Tensor] = {}
    for rank, part in enumerate(parts):
        held = chunks(rank, ranks, kind)
        pieces |= zip(held, part.chunk(len(held), dim), strict=True)
    return torch.cat([pieces[chunk] for chunk in sorted(pieces)], dim)


def positions(length: int, *, rank: int, ranks: int, kind: Kind, device: torch.device) -> Tensor:
    """The positions (T / ranks,) in their sequence of `length` tokens that a rank's tokens have."""
    return split(torch.arange(length, device=device), 0, rank=rank, ranks=ranks, kind=kind)


def gather(part: Tensor, group: dist.ProcessGroup, *, kind: Kind) -> Tensor:
    """The whole (B, T) of which every rank of the group holds a part (B, T / ranks). For small things: no gradient."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return unsplit(parts, 1, kind=kind)
