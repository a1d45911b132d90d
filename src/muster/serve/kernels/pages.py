"""How keys and values lie in the cache's pages: like activations, or as int8 with a scale for each token and head.

A row of int8 is D whole numbers -127..127 and, in its last four bytes, an fp32 scale: value = number * scale. The
scale lies with its row, so that blocks are copied, shared and wiped as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muster.serve.kernels.shape import SCALE_BYTES


def to_rows(x: Tensor) -> Tensor:
    """Numbers (..., D) as rows (..., D + 4) of int8. What is not finite comes back as such."""
    exact = x.float()
    largest = exact.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    whole = torch.round(exact * inverse).nan_to_num_().to(torch.int8)
    return torch.cat([whole, (largest / 127).view(torch.int8)], -1)


def from_rows(rows: Tensor) -> Tensor:
    """The numbers (..., D) of rows of int8, fp32."""
    numbers, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    return numbers.float() * scale.contiguous().view(torch.float32)
