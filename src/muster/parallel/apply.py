"""Applies a layout to a plain model, in one place and one order: recompute -> shard -> fill.

The model arrives on the meta device; only each rank's shards are ever allocated, and they
are filled one parameter at a time, so that no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from muster.parallel import data, offload
from muster.parallel.layout import Layout

Value = Callable[[str, torch.Size], Tensor]
"""The whole value of a parameter, by name and shape."""


def apply(
    model: nn.Module,
    blocks: list[nn.Module],
    layout: Layout,
    mesh: DeviceMesh,
    *,
    compute: torch.dtype,
    value: Value,
) -> None:
    """Distribute `model` (on meta) in place over `mesh` and fill its parameters from `value`.

    `blocks` are the units of recomputation and of gathering, in forward order.
    """
    if layout.recompute == "full":
        for block in blocks:
            _recompute(block)
    data.shard(blocks, model, mesh, layout, compute)
    model.to_empty(device=offload.home(layout.offload, mesh.device_type))
    fill(model, value)


@torch.no_grad()
def fill(model: nn.Module, value: Value) -> None:
    """Set every parameter from its whole value; each rank keeps its shard."""
    for name, parameter in model.named_parameters():
        whole = value(name, parameter.shape)
        if isinstance(parameter, DTensor):
            whole = whole.to(parameter.device)
            # Every rank makes the same values, so nothing needs to be sent.
            parameter.copy_(
                distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            )
        else:
            parameter.copy_(whole)


def _recompute(block: nn.Module) -> None:
    """Activation recomputation (Chen et al. 2016): keep a block's input only, run it again in backward."""
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The model draws no random numbers inside a block, so there is no RNG state to restore.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    block.forward = recomputed
