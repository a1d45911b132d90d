"""Applies a layout to a plain model, in one place and one order:
expert -> tensor -> context -> recompute -> shard -> fill.

The model arrives on the meta device; only each rank's shards are ever allocated, and they
are filled one parameter at a time, so that no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muster.model.moe import MoE
from muster.model.transformer import Transformer, named_tensors
from muster.parallel import data, expert, offload, recompute, tensor
from muster.parallel.mesh import Group, Mesh
from muster.parallel.ring import Ring
from muster.parallel.ulysses import Ulysses

Value = Callable[[str, torch.Size], Tensor]
"""The whole value of a parameter, by name and shape."""


def apply(model: Transformer, mesh: Mesh, *, compute: torch.dtype, value: Value) -> None:
    """Distribute `model` (on meta) in place over `mesh` and fill its parameters from `value`."""
    layout = mesh.layout
    if layout.expert > 1:
        expert.divide(model, mesh.expert())
    if layout.tensor > 1:
        tensor.divide(model, mesh.tensor(), sequence=layout.sequence_parallel)
    if layout.context > 1:
        _attend_across(model, mesh.groups["context"], layout.context_kind)
    recompute.apply(model, layout.recompute)
    data.shard(model, mesh, compute)
    model.to_empty(device=offload.home(layout.offload, mesh.device.type))
    fill(model, value)


def _attend_across(model: Transformer, group: Group, kind: str) -> None:
    """Have a model's blocks work on sequences whose tokens are split over the ranks of `group`."""

    def total(counts: Tensor) -> Tensor:
        dist.all_reduce(counts := counts.clone(), group=group)
        return counts

    for block in model.blocks:
        block.attention.attend = Ring(group) if kind == "ring" else Ulysses(group)
        if isinstance(block.mlp, MoE):
            block.mlp.sum_over_sequence = total


@torch.no_grad()
def fill(model: nn.Module, value: Value) -> None:
    """Set every parameter and buffer from its whole value; each rank keeps its shard."""
    for name, own in named_tensors(model):
        whole = value(name, own.shape)
        if not isinstance(own, DTensor):
            own.copy_(whole)
            continue
        # Every rank makes the same values, so nothing needs to be sent.
        for chunk in own.__create_chunk_list__():  # type: ignore[no-untyped-call]
            part = tuple(
                slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            own.to_local().copy_(whole[part])
