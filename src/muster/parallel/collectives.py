"""Collectives that torch 2.13 renamed, under the names that every supported version has one of."""

from __future__ import annotations

import torch.distributed as dist

all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
"""all_gather(out, own, group=): `out` (ranks * n, ...) from every rank's `own` (n, ...)."""
reduce_scatter = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)
"""reduce_scatter(own, whole, group=): `own` (n, ...) of the sum of every rank's `whole` (ranks * n, ...)."""
