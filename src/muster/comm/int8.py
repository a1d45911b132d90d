"""Collectives that send int8: a quarter of fp32's bytes for gradients, half of bf16's for parameters.

ZeRO++ (Wang et al. 2023) on FSDP2's public hooks: an all-gather of quantised parameters
(qwZ), and a reduce-scatter that is an all-to-all of quantised chunks followed by a sum in
the reduce dtype (qgZ), so that a gradient is rounded once, however many ranks there are. What rounding
takes away is kept and added to the next gradient (error feedback, Karimireddy et al. 2019),
so over many steps nothing is lost.

The residual of a reduction is as large as the buffer that goes in: for the reduce-scatter
that is the *unsharded* gradient in fp32, 4 bytes a parameter on every rank, and
4 (1 + 1 / replicas) / shards bytes a parameter for the all-reduce over copies.

On one core of a 2020s server encoding takes about 0.16 ms and decoding 0.11 ms a megabyte of fp32, so the
reduce-scatter spends 0.4 ms a megabyte to send 3/8 (two ranks) to 3/4 (many) of a megabyte less: it pays
on links below some 1 to 2 GB/s for each rank, not between processes of one machine.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.collectives import Allocating, all_gather
from muster.comm.quantize import add_decoded, decode, encode, encoded_bytes


class Feedback:
    """Encodes one buffer step after step, each time adding what the last encoding lost."""

    def __init__(self) -> None:
        self._lost: Tensor | None = None

    @property
    def residual_bytes(self) -> int:
        return 0 if self._lost is None else self._lost.nbytes

    def forget(self) -> None:
        """Start over with nothing lost."""
        self._lost = None

    def encode(self, values: Tensor) -> Tensor:
        """Encode (R, N) and keep `values`, which now hold the error and belong to this object."""
        # A unit whose set of gradients changed starts over: its buffer is another one.
        if self._lost is not None and self._lost.shape == values.shape:
            values.add_(self._lost)
        encoded = encode(values)
        add_decoded(encoded, values, factor=-1.0)
        self._lost = values
        return encoded


class Int8AllGather(Allocating):
    """For `FSDPModule.set_custom_all_gather`. Every rank decodes the same bytes, its own part too: all hold equal
    parameters. The master weights stay exact, so errors do not add up over steps."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Fill `output_tensor` (R * N,) from each rank's `input_tensor` (N,)."""
        if not input_tensor.is_floating_point():
            raise TypeError("int8 parameters need one floating-point dtype in all of a unit")
        mine = encode(input_tensor.view(1, -1))
        arrived = mine.new_empty((group.size(), mine.shape[1]))
        all_gather(arrived, mine, group=group)
        decode(arrived, output_tensor.view(group.size(), -1))


class Int8ReduceScatter(Allocating):
    """For `FSDPModule.set_custom_reduce_scatter`, one for each unit: it keeps that unit's residual."""

    def __init__(self) -> None:
        self._feedback = Feedback()

    @property
    def residual_bytes(self) -> int:
        return self._feedback.residual_bytes

    def forget(self) -> None:
        self._feedback.forget()

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Reduce every rank's `input_tensor` (R * N,), which is kept and overwritten, to `output_tensor` (N,)."""
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"int8 gradients can be summed or averaged, not {op}")
        ranks = group.size()
        _sum_chunks(self._feedback.encode(input_tensor.view(ranks, -1)), output_tensor, group)
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(ranks)


class Int8AllReduce:
    """For `FSDPModule.set_all_reduce_hook`: the mean over copies, one for each unit.

    A quantised reduce-scatter, then a quantised all-gather of the sums, each with its own
    residual: two roundings, and every copy ends with the same bits.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._parts, self._sums = Feedback(), Feedback()

    @property
    def residual_bytes(self) -> int:
        return self._parts.residual_bytes + self._sums.residual_bytes

    def forget(self) -> None:
        self._parts.forget()
        self._sums.forget()

    def __call__(self, gradient: Tensor) -> None:
        """Replace the flat `gradient` (N,) by its mean over the group."""
        ranks = self._group.size()
        parts = gradient.new_zeros(ranks * -(-gradient.numel() // ranks))
        parts[: gradient.numel()] = gradient
        mean = gradient.new_empty(parts.numel() // ranks)
        _sum_chunks(self._parts.encode(parts.view(ranks, -1)), mean, self._group)
        mean.div_(ranks)
        mine = self._sums.encode(mean.view(1, -1))
        arrived = mine.new_empty((ranks, mine.shape[1]))
        all_gather(arrived, mine, group=self._group)
        decode(arrived, parts := gradient.new_empty((ranks, mean.numel())))
        gradient.copy_(parts.view(-1)[: gradient.numel()])


def _sum_chunks(encoded: Tensor, out: Tensor, group: dist.ProcessGroup) -> None:
    """Send row r of `encoded` to rank r, and sum what arrives into `out` (N,), in the order of ranks."""
    assert encoded.shape[1] == encoded_bytes(out.numel())
    arrived = torch.empty_like(encoded)
    dist.all_to_all_single(arrived, encoded, group=group)
    out.zero_()
    for part in arrived:
        add_decoded(part.view(1, -1), out.view(1, -1))
