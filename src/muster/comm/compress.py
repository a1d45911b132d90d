"""Installs a choice of compression on a model that FSDP2 has divided; the one entry of this room for training.

bf16 and fp16 are FSDP2's `MixedPrecisionPolicy(reduce_dtype=...)`. For int8 and powersgd the
reduction over copies is ours (`Choice.takes_over_copies`): FSDP2 must be given the shard axis alone, and
averages over it, so each copy's loss is scaled as ever. Parameters are then DTensors that do not show
that other ranks hold copies: whoever sums over ranks or picks one to save must know from the layout.

Residuals are not in checkpoints: they are private to a rank, for int8 larger than the rank's weights, and
mean nothing on another layout. Call `forget()` whenever a checkpoint is written: both
the run that goes on and the run that resumes then start with nothing lost, so they stay
bitwise equal, for the price of one step's rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from muster.comm import powersgd
from muster.comm.choice import Choice
from muster.comm.int8 import Int8AllGather, Int8AllReduce, Int8ReduceScatter
from muster.comm.units import fsdp_units, padded_shard_shape, unit_parameters

Reduction = Int8ReduceScatter | Int8AllReduce | powersgd.PowerSGD


class Compression:
    """What was installed: the residuals of every unit."""

    def __init__(self, reductions: Sequence[Reduction]) -> None:
        self._reductions = reductions

    @property
    def residual_bytes(self) -> int:
        """Memory that error feedback takes on this rank; 0 before the first step."""
        return sum(reduction.residual_bytes for reduction in self._reductions)

    def forget(self) -> None:
        """Drop all residuals, when a checkpoint is written and after a step that was thrown away."""
        for reduction in self._reductions:
            reduction.forget()


def compress(model: nn.Module, choice: Choice, groups: Mapping[str, dist.ProcessGroup]) -> Compression:
    """Install `choice` on every FSDP unit of `model`.

    `groups` holds, if there are copies, the process group of the axis `replicate`; the unit knows its shard axis.
    """
    copies = groups.get("replicate")
    reductions: list[Reduction] = []
    for index, unit in enumerate(fsdp_units(model)):
        if choice.parameters == "int8":
            unit.set_custom_all_gather(Int8AllGather())  # type: ignore[arg-type]  # its base class is private
        if choice.gradients == "int8":
            reductions.append(scatter := Int8ReduceScatter())
            unit.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
        if choice.takes_over_copies and copies is not None and copies.size() > 1:
            reductions.append(hook := _between_copies(unit, index, choice, copies))
            unit.set_all_reduce_hook(hook)
    return Compression(reductions)


def _between_copies(
    unit: FSDPModule, index: int, choice: Choice, copies: dist.ProcessGroup
) -> Int8AllReduce | powersgd.PowerSGD:
    parameters = unit_parameters(unit)
    if any("replicate" in (parameter.device_mesh.mesh_dim_names or ()) for parameter in parameters):
        raise ValueError("FSDP2 already reduces over copies here: give fully_shard the shard axis alone")
    if choice.gradients == "int8":
        return Int8AllReduce(copies)
    shapes = [padded_shard_shape(parameter) for parameter in parameters]
    return powersgd.PowerSGD(powersgd.plan(shapes, choice.rank), copies, seed=index)
