"""Splitting the tokens of whole sequences over the context axis."""

from __future__ import annotations

import torch
from torch import Tensor

from muster.parallel.context import Kind, chunk_count, chunks


def split(x: Tensor, dim: int, *, rank: int, ranks: int, kind: Kind) -> Tensor:
    """A rank's part of x: `dim` holds T tokens in x, T / ranks in the part. T must divide, see `problems`."""
    pieces = x.chunk(chunk_count(ranks, kind), dim)
    return torch.cat([pieces[chunk] for chunk in chunks(rank, ranks, kind)], dim)
