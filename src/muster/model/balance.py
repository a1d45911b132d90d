"""Keeping the experts' load even: an auxiliary loss, or a bias on the choice of experts.

Knows scores and counts, not modules. B batch, T tokens, X experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequence_balance_loss(scores: Tensor, counts: Tensor) -> Tensor:
    """The auxiliary loss of each sequence times its tokens, summed: fp32 scalar.

    The sequence-wise loss of DeepSeek-V3 (DeepSeek-AI 2024, equations 17 to 20), which is about 1 for a token
    when the load is even. As a sum over sequences it does not depend on which ranks or microbatches they are in.

    scores (B, T, X) positive; counts (B, X): how many of a sequence's tokens chose each expert. Where a sequence is
    spread over ranks, scores are a rank's own and counts those of the whole sequence: the loss is linear in
    the scores, so the ranks' losses, and their gradients, add up to that of the whole sequence.
    """
    experts = counts.shape[-1]
    probability = (scores / scores.sum(-1, keepdim=True)).sum(1)  # (B, T, X) -> (B, X)
    share = counts / counts.sum(-1, keepdim=True)  # of the chosen experts; 1 / X each when the load is even
    return experts * (share * probability).sum()


def attach(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`carrier` unchanged; whoever runs its backward pass also runs that of `scale * loss`.

    So an auxiliary loss needs no way out of the model, through pipeline stages for example.
    """
    attached: Tensor = _Attach.apply(carrier, loss, scale)  # type: ignore[no-untyped-call]
    return attached


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.new_empty(())
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(ctx.like, ctx.scale), None


@torch.no_grad()
def update_bias(bias: Tensor, load: Tensor, rate: float) -> None:
    """Move bias (X,) by `rate` towards the experts with less than the mean of load (X,), away from the others.

    Loss-free balancing (Wang et al. 2024): after each step, with the load of the whole global batch.
    """
    mean = load.double().mean()
    bias += rate * torch.sign(mean - load.double()).to(bias.dtype)
