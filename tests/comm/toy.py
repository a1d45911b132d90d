"""A toy transformer on FSDP2, trained with SGD on fixed batches, for the tests of compression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from muster.comm.choice import Choice
from muster.comm.compress import Compression, compress
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer

SPEC = TransformerSpec(
    family="llama",
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab=65,  # does not divide by 2 or 4, so that padding is tested too
    context=16,
    tied=True,
)


@dataclass(frozen=True)
class Toy:
    model: Transformer
    groups: Mapping[str, dist.ProcessGroup]
    compression: Compression

    def backward(self, step: int) -> Tensor:
        """Gradients of this rank's part of a batch of 8 sequences; the rank's part of the batch's mean loss."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(step % 4)
        tokens = torch.randint(0, SPEC.vocab, (8, SPEC.context + 1), generator=generator)
        tokens = tokens[rank * 8 // ranks : (rank + 1) * 8 // ranks]
        loss = self.model(tokens[:, :-1], tokens[:, 1:]) / (8 * SPEC.context)
        (loss * ranks).backward()
        return loss.detach()

    def step(self, step: int) -> float:
        """One step of SGD; the global batch's mean loss."""
        loss = self.backward(step)
        with torch.no_grad():
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter -= 0.25 * parameter.grad
                parameter.grad = None
        dist.all_reduce(loss)
        return float(loss)

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        """Whole parameters, for comparison."""
        return {name: _whole(parameter).numpy() for name, parameter in self.model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def toy(choice: Choice, *, replicate: int, shard: int, compute: torch.dtype | None = None) -> Toy:
    """The toy on a mesh of replicate x shard ranks, with ZeRO-3 on the shard axis."""
    mesh = init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    model = Transformer(SPEC)
    model.init_weights(seed=0)
    ours = mesh["shard"] if choice.takes_over_copies or replicate == 1 else mesh
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=choice.reduce_dtype, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=ours, mp_policy=policy)
    fully_shard(model, mesh=ours, mp_policy=policy, reshard_after_forward=False)
    assert isinstance(model, FSDPModule)
    groups = {axis: mesh.get_group(axis) for axis in ("replicate", "shard")}
    return Toy(model, groups, compress(model, choice, groups))
