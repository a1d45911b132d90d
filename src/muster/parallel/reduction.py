"""How FSDP2's parameters and gradients travel between processes of gloo: through the hooks that it offers for that.

It asks a hook for the input and for the output of each collective, and then to carry it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from muster.comm.collectives import Allocating, all_gather, reduce_scatter


def install(unit: FSDPModule, *, shard: int, device: torch.device) -> None:
    """Give a unit whose parameters `shard` ranks divide the hooks that suit it."""
    # Their base classes are private to torch, which asks for no more than these two methods.
    if shard == 1:
        unit.set_custom_reduce_scatter(InPlaceReduction())  # type: ignore[arg-type]
    elif device.type == "cpu":
        unit.set_custom_all_gather(_AllGather())  # type: ignore[arg-type]
        unit.set_custom_reduce_scatter(_ReduceScatter())  # type: ignore[arg-type]


class InPlaceReduction:
    """Where a rank is alone on its shard axis, so that there is nothing to scatter: for `set_custom_reduce_scatter`.

    FSDP2 would copy the input to the output. Lending it the same buffer for both, one for each unit, saves that copy
    and the memory of a second set of gradients.
    """

    def __init__(self) -> None:
        self._lent: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The input of a reduction, and at the next call, which asks for its output, the same tensor."""
        if self._lent is None:
            self._lent = torch.empty(*size, dtype=dtype, device=device)
            return self._lent
        buffer, self._lent = self._lent, None
        assert buffer.shape == torch.Size(size)
        return buffer

    def __call__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a reduce-scatter over one rank needs no communication")


class _AllGather(Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        all_gather(output_tensor, input_tensor, group=group)


class _ReduceScatter(Allocating):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        assert op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
        reduce_scatter(output_tensor, input_tensor, group=group)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(group.size())
