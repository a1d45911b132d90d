"""Embedding, loss and logits with the vocabulary divided over the tensor axis; logits of all of it are never gathered
for the loss (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muster.model.loss import IGNORED

CHUNK_ROWS = 512
"""Rows of hidden states whose logits are made at a time."""


class ParallelCrossEntropy:
    """`linear_cross_entropy` for a weight (V / ranks, E) that holds this rank's part of the vocabulary."""

    def __init__(self, vocab: int, group: dist.ProcessGroup) -> None:
        self._group = group
        self._first = parts(vocab, group.size())[group.rank()].start

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy in nats (fp32 scalar), equal on every rank; the gradient of hidden is to be summed."""
        loss: Tensor = _ParallelCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, self._first, self._group
        )
        return loss


class _ParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else hidden.new_empty(0)
        grad_weight = torch.zeros_like(weight) if wants_gradient else weight.new_empty(0)
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = (hidden[rows] @ weight.t()).float()  # (n, V / ranks)
            loss, gradient = _loss_and_gradient(logits, targets[rows], first, group)
            total += loss
            if wants_gradient:
                gradient = gradient.to(hidden.dtype)
                torch.mm(gradient, weight, out=grad_hidden[rows])
                grad_weight.addmm_(gradient.t(), hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Summed loss over the whole vocabulary, and its gradient for this rank's logits (n, V / ranks), fp32."""
    highest = logits.amax(-1)  # (n,)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - highest[:, None]
    scored = targets != IGNORED
    index = targets - first
    own = scored & (index >= 0) & (index < logits.shape[1])
    index = index.where(own, 0)[:, None]
    chosen = shifted.gather(1, index)[:, 0] * own
    exponentials = shifted.exp_()
    sums = torch.stack([exponentials.sum(-1), chosen])  # (2, n)
    dist.all_reduce(sums, group=group)
    loss = ((sums[0].log() - sums[1]) * scored).sum()
    gradient = exponentials.div_(sums[0][:, None])
    gradient.scatter_add_(1, index, -own[:, None].to(gradient.dtype))
    return loss, gradient.mul_(scored[:, None])


def parts(vocab: int, ranks: int) -> list[range]:
    """The tokens that each rank holds, as DTensor divides a dim: equal parts, the last ones smaller."""
    size = -(-vocab // ranks)
    return [range(min(rank * size, vocab), min((rank + 1) * size, vocab)) for rank in range(ranks)]


def gather_logits(own: Tensor, vocab: int, group: dist.ProcessGroup) -> Tensor:
    """Logits (..., V) from each rank's (..., V / ranks), on every rank; not differentiable."""
    sizes = [len(part) for part in parts(vocab, group.size())]
    padded = own.new_zeros(*own.shape[:-1], max(sizes))
    padded[..., : own.shape[-1]] = own
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[..., :size] for part, size in zip(gathered, sizes, strict=True)], dim=-1)
