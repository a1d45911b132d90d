"""Applies a layout to a plain model, in one place and one order: tensor -> recompute -> shard -> fill.

The model arrives on the meta device; only each rank's shards are ever allocated, and they
are filled one parameter at a time, so that no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muster.model.transformer import Transformer
from muster.parallel import data, recompute, tensor
from muster.parallel.mesh import Mesh

Value = Callable[[str, torch.Size], Tensor]
"""The whole value of a parameter, by name and shape."""


def apply(model: Transformer, mesh: Mesh, *, compute: torch.dtype, value: Value) -> None:
    """Distribute `model` (on meta) in place over `mesh` and fill its parameters from `value`."""
    layout = mesh.layout
    if layout.tensor > 1:
        tensor.divide(model, mesh.tensor(), sequence=layout.sequence_parallel)
    recompute.apply(model, layout.recompute)
    data.shard(model, mesh, compute)
    model.to_empty(device=mesh.device.type)
    fill(model, value)


@torch.no_grad()
def fill(model: nn.Module, value: Value) -> None:
    """Set every parameter from its whole value; each rank keeps its shard."""
    for name, parameter in model.named_parameters():
        whole = value(name, parameter.shape)
        if not isinstance(parameter, DTensor):
            parameter.copy_(whole)
            continue
        # Every rank makes the same values, so nothing needs to be sent.
        for chunk in parameter.__create_chunk_list__():  # type: ignore[no-untyped-call]
            own = tuple(
                slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            parameter.to_local().copy_(whole[own])
