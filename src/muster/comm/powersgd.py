"""PowerSGD (Vogels et al. 2019): copies exchange low-rank factors of their gradients instead of the gradients.

A matrix M (rows, columns) of rank r stands for itself as P Q^T: every copy multiplies its M by
the last step's Q, the P are averaged and orthogonalised, each M is multiplied by that P, and the
Q are averaged. That is one power iteration a step, and r (rows + columns) elements sent instead of
rows x columns. What the product misses is kept and added to the next gradient, on each copy
against its own product rather than the average (as in the paper's Algorithm 2): the
differences between copies would otherwise pile up in the residuals for ever.

Vectors, and matrices that a product would not shorten, are averaged whole, in the same message
as the P. Where a shard axis divides the matrices, each rank compresses its own part: its
(padded) rows. Parameters of more dims count as matrices of their last dim.

It runs whenever FSDP2 reduces: once a step under ZeRO-0 and 1, every microbatch under ZeRO-2 and 3.

The residual takes one fp32 gradient shard, 4 / shards bytes a parameter. Copies stay bitwise equal as long as
their machines orthogonalise the same bits to the same bits, so all must be of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Which parts of a flat gradient are matrices to compress; the rest is sent whole."""

    rank: int
    elements: int
    matrices: tuple[tuple[int, int, int], ...]
    """(offset, rows, columns) in the buffer."""

    @property
    def messages(self) -> tuple[int, int]:
        """Elements of the two all-reduces of a step."""
        compressed = sum(rows * columns for _, rows, columns in self.matrices)
        first = sum(rows * self.rank for _, rows, _ in self.matrices) + self.elements - compressed
        return first, sum(columns * self.rank for _, _, columns in self.matrices)


def plan(shapes: Sequence[Sequence[int]], rank: int) -> Plan:
    """Choose among parameters of these shapes, which lie one after another in a flat buffer."""
    offset, matrices = 0, []
    for shape in shapes:
        columns = shape[-1] if len(shape) > 1 else 1
        rows = prod(shape) // max(columns, 1)
        if rank * (rows + columns) < rows * columns:
            matrices.append((offset, rows, columns))
        offset += prod(shape)
    return Plan(rank, offset, tuple(matrices))


class PowerSGD:
    """For `FSDPModule.set_all_reduce_hook`: the mean over copies of one unit's gradient, in low rank."""

    def __init__(self, plan: Plan, group: dist.ProcessGroup, seed: int) -> None:
        """`seed` must be the same on all ranks of `group`, and should differ between units."""
        self._plan, self._group, self._seed = plan, group, seed
        self.forget()

    @property
    def residual_bytes(self) -> int:
        return sum(error.nbytes for error in self._errors)

    def forget(self) -> None:
        """Start over: nothing missed, and new random Q."""
        self._errors: list[Tensor] = []
        self._right: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> None:
        """Replace the flat `gradient` by the compressed mean over the group."""
        if gradient.numel() != self._plan.elements:
            raise ValueError(
                f"a unit was planned for {self._plan.elements} gradients but reduces {gradient.numel()}: PowerSGD "
                f"needs a gradient for every parameter in every step"
            )
        matrices = [
            gradient[offset : offset + rows * columns].view(rows, columns)
            for offset, rows, columns in self._plan.matrices
        ]
        if not self._right:
            self._errors = [torch.zeros_like(matrix) for matrix in matrices]
            self._right = self._random(gradient)
        for matrix, error in zip(matrices, self._errors, strict=True):
            matrix.add_(error)
        # P^T = Q^T M^T, because a product with a narrow factor on the left is up to ten times as fast on CPU.
        left = [(right @ matrix.T).T for matrix, right in zip(matrices, self._right, strict=True)]
        whole = self._whole(gradient)
        self._average(left + whole)
        left = [torch.linalg.qr(factor).Q for factor in left]
        self._right = [factor.T @ matrix for matrix, factor in zip(matrices, left, strict=True)]
        for error, matrix, factor, right in zip(self._errors, matrices, left, self._right, strict=True):
            torch.addmm(matrix, factor, right, alpha=-1, out=error)
        self._average(self._right)
        for matrix, factor, right in zip(matrices, left, self._right, strict=True):
            torch.mm(factor, right, out=matrix)

    def _whole(self, gradient: Tensor) -> list[Tensor]:
        """Views of what lies between the matrices."""
        views, start = [], 0
        for offset, rows, columns in (*self._plan.matrices, (gradient.numel(), 0, 0)):
            views.append(gradient[start:offset])
            start = offset + rows * columns
        return views

    def _average(self, parts: list[Tensor]) -> None:
        """Average tensors over the group, in place and in one message."""
        if not parts:
            return
        message = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(message, group=self._group)
        message.div_(self._group.size())
        for part, mean in zip(parts, torch.split(message, [part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))

    def _random(self, gradient: Tensor) -> list[Tensor]:
        """The first Q^T (rank, columns), equal on every copy whatever its device."""
        generator = torch.Generator().manual_seed(self._seed)
        return [
            torch.randn(self._plan.rank, columns, generator=generator).to(gradient)
            for _, _, columns in self._plan.matrices
        ]
