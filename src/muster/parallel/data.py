"""Data parallelism and ZeRO (Rajbhandari et al. 2020) on torch's FSDP2, one code path for every stage.

The mesh has two axes, replicate and shard. What a stage divides follows from when FSDP2
gathers and reduces:

    stage  over      parameters between uses        gradients are reduced
    0      replicate whole on every rank            once a step (all-reduce)
    1      shard     gathered once a step           once a step (reduce-scatter)
    2      shard     gathered once a microbatch     every microbatch, kept sharded
    3      shard     gathered for each block, twice every microbatch, kept sharded

Master weights, gradients and optimizer state are fp32 shards in every case; the compute
copies that FSDP2 gathers are bf16 under `precision: bf16`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from muster.parallel import offload
from muster.parallel.layout import Layout


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The data axes: (shard,), or (replicate, shard) where there are copies."""
    if layout.replicate == 1:
        return init_device_mesh(device.type, (layout.shard,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard")
    )


def shard(
    blocks: list[nn.Module], model: nn.Module, mesh: DeviceMesh, layout: Layout, compute: torch.dtype
) -> None:
    """Apply FSDP2 to each block and then to the rest of the model (embedding, last norm and head together)."""
    # Gradients are summed over ranks and microbatches in fp32; where there is nothing to sum, that would only copy.
    alone = layout.world == layout.accumulate == 1
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != torch.float32 else None,
        reduce_dtype=None if alone else torch.float32,
        cast_forward_inputs=False,
    )
    homes = offload.policy(layout.offload)
    for module in blocks:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=layout.zero == 3,
            mp_policy=policy,
            offload_policy=homes,
        )
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=homes)


def sum_over_ranks(loss: Tensor, layout: Layout) -> Tensor:
    """Scale a rank's loss so that FSDP2, which averages gradients over the ranks, sums them instead.

    (Asking it for a divide factor of 1 costs two more passes over the gradients where a rank is alone on its
    shard axis, and an operation that gloo lacks elsewhere.)
    """
    return loss * layout.world


def begin_microbatch(model: nn.Module, layout: Layout, *, is_last: bool) -> None:
    """Tell FSDP2 what the coming backward pass owes the other ranks, by ZeRO stage."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last or layout.zero >= 2)
    model.set_is_last_backward(is_last)
    # Stages 0 and 1 keep the gathered parameters until the optimizer changes them.
    model.set_reshard_after_backward(is_last or layout.zero >= 2)


def free_gathered(model: nn.Module) -> None:
    """Drop gathered parameters after a forward pass without a backward pass, so that the shards are in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
