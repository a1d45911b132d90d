"""Matrix products of groups of rows, each group with a matrix of its own: what experts multiply with.

N rows, I and O features of a row before and after, X groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIZE = 32
"""Rows that groups are rounded up to where a new size costs much."""


def linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (N, I) times their groups' weights (X, O, I), in runs of counts (X,) rows: (N, O)."""
    # One kernel and no wait for the counts; also on CPU it is the faster way (measured with torch 2.13, fp32 and
    # bf16, 4 to 64 groups: 1.05 to 2 times a loop). It wants rows of whole 16 bytes, and torch.compile can trace it in
    # bf16 only.
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and (rows.dtype == torch.bfloat16 or not torch.compiler.is_compiling()):
        ends = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    groups = zip(torch.split(rows, counts.tolist()), weight.unbind(), strict=True)
    return torch.cat([F.linear(group, matrix) for group, matrix in groups])


def few_sizes_pay(rows: Tensor, counts: Tensor) -> bool:
    """On CPU a bf16 product of a new size has a kernel generated for it and kept (oneDNN): measured 0.6 ms and 0.6 MB
    each, up to a thousand of them, and experts have new sizes in every step. fp32 and GPUs know no such cost."""
    on_cpu = rows.device.type == "cpu" and rows.dtype == torch.bfloat16
    return on_cpu and len(rows) >= 2 * _SIZE * len(counts)


def round_up(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows (N, E) with each group filled up with zeros to a multiple of _SIZE, where they are then, the new counts."""
    sizes = (counts + _SIZE - 1) // _SIZE * _SIZE
    added = (sizes - counts).cumsum(0) - (sizes - counts)  # before each group
    places = torch.arange(len(rows), device=rows.device) + added.repeat_interleave(counts)
    spread: Tensor = _Spread.apply(rows, places, int(sizes.sum()))  # type: ignore[no-untyped-call]
    return spread, places, sizes


class _Spread(torch.autograd.Function):
    """`index_copy` into zeros, which would keep the rows for their shape."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(length, rows.shape[1]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None
