"""Data parallelism and ZeRO (Rajbhandari et al. 2020) on torch's FSDP2, one code path for every stage.

Over the axes replicate and shard (which context joins). What a stage divides follows from when FSDP2
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

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from muster.model.moe import MoE
from muster.model.transformer import Transformer
from muster.parallel import offload, reduction
from muster.parallel.layout import Layout
from muster.parallel.mesh import Mesh


def shard(model: Transformer, mesh: Mesh, compute: torch.dtype) -> None:
    """Apply FSDP2 to each unit of a model, in place."""
    layout = mesh.layout
    # Gradients are summed over ranks and microbatches in fp32, or as compression says; where there is nothing
    # to sum, that would only copy.
    alone = layout.averaged == layout.accumulate == 1
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != torch.float32 else None,
        reduce_dtype=None if alone else layout.compress.reduce_dtype,
        cast_forward_inputs=False,
    )
    units = list(_units(model, mesh))
    ends: list[list[nn.Module | None]] = [[model.embed], [model]]
    for unit, data in units:
        # The model's own unit is gathered as long as any of it is in use: a tied embedding at both ends. An
        # embedding of its own stays as well, as gathering it again in the backward pass would be for nothing.
        fully_shard(
            unit,
            mesh=data,
            reshard_after_forward=layout.zero == 3 and unit not in ends,
            mp_policy=policy,
            offload_policy=offload.policy(layout.offload),
        )
        reduction.install(_first(unit), shard=data["shard"].size(), device=mesh.device)
    if layout.zero == 3:
        blocks = [_first(unit) for unit, _ in units if unit not in ends]
        for index, block in enumerate(blocks):
            block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + layout.prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(index - layout.prefetch, 0) : index][::-1])


def _units(model: Transformer, mesh: Mesh) -> Iterator[tuple[list[nn.Module], DeviceMesh]]:
    """What is gathered and reduced at once, and over which ranks: buckets of blocks, and the rest of the model.

    Experts that are divided are a unit of their own: each expert rank has other ones, so fewer ranks share them.
    """
    blocks, size = model.blocks, mesh.layout.bucket
    for start in range(0, len(blocks), size):
        bucket = blocks[start : start + size]
        for block in bucket:
            if mesh.layout.expert > 1 and isinstance(block.mlp, MoE):
                yield [block.mlp.experts], mesh.expert_data()
        yield list[nn.Module](bucket), mesh.dense_data()
    if model.embed is not None and model.head is not None:
        yield (
            [model.embed],
            mesh.dense_data(),
        )  # reduced apart from the head, which is as large: half the buffers
    yield [model], mesh.dense_data()


def _first(unit: list[nn.Module]) -> FSDPModule:
    """The module that stands for a unit once FSDP2 has been applied to it."""
    module = unit[0]
    assert isinstance(module, FSDPModule)
    return module


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
