"""Cross entropy straight from the last hidden states: the logits of a batch are never stored whole.

Rows go through in chunks. A chunk's logits become, in place, the gradient of its loss, which
is multiplied out to the gradients of the hidden states and the head at once, so that the
backward pass only scales them. The softmax runs in fp32 over a few rows at a time, small
enough to stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Summed cross entropy (fp32 scalar) of hidden (N, E), weight (V, E) and targets (N,)."""

IGNORED = -100
"""Target of a position that is not scored."""

_CHUNK_ROWS = 512
_SOFTMAX_ELEMENTS = 1 << 19


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy in nats (fp32 scalar) of `hidden @ weight.T` against `targets`.

    hidden (N, E), weight (V, E), targets (N,) int64 with IGNORED where a row is not scored.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_gradient else hidden.new_empty(0)
        grad_weight = torch.empty_like(weight) if wants_gradient else weight.new_empty(0)
        for start in range(0, hidden.shape[0], _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            logits = hidden[rows] @ weight.t()  # (n, V)
            total += _loss_to_gradient_(logits, targets[rows])
            if wants_gradient:
                torch.mm(logits, weight, out=grad_hidden[rows])
                grad_weight.addmm_(logits.t(), hidden[rows], beta=1 if start else 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None


def _loss_to_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of `logits` (n, V), which become its gradient: softmax minus one at the target."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    # On a GPU one pass over the chunk; on CPU pieces that stay in cache.
    step = max(_SOFTMAX_ELEMENTS // logits.shape[1], 1) if logits.device.type == "cpu" else logits.shape[0]
    for start in range(0, logits.shape[0], step):
        piece, target = logits[start : start + step], targets[start : start + step, None]
        scored = target != IGNORED
        target = target.where(scored, 0)
        logp = torch.log_softmax(piece, -1, dtype=torch.float32)
        total -= (logp.gather(1, target) * scored).sum()
        gradient = logp.exp_()
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        piece.copy_(gradient.mul_(scored))
    return total
