"""Mixture of experts: each token goes through the few experts that its router chooses. No token is dropped.

Whether all experts are here (`MoE.exchange`) and whether all of a sequence is (`MoE.sum_over_sequence`) is said from
outside; nothing here knows of ranks. B batch, T tokens, N rows, E embed, F ffn of an expert, X experts,
k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muster.model import balance, grouped
from muster.model.mlp import MLP
from muster.model.spec import TransformerSpec


def same(tensor: Tensor) -> Tensor:
    """`tensor` itself: what strategies do where nothing is divided."""
    return tensor


class Router(nn.Module):
    """Scores experts and chooses `experts_per_token` of them for each token, all in fp32."""

    bias: Tensor | None

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.experts_per_token, self.renormalize = spec.experts_per_token, spec.router_renormalize
        self.score = torch.sigmoid if spec.router == "sigmoid" else _softmax
        self.weight = nn.Parameter(torch.empty(spec.experts, spec.width))
        # Not trained by gradients, and too finely stepped for bf16.
        self.register_buffer(
            "bias", torch.empty(spec.experts, dtype=torch.float32) if spec.router_bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, T, X) of x (B, T, E)."""
        return self.score(F.linear(x.float(), self.weight.float()))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers (B, T, k) of the experts chosen by scores (B, T, X)."""
        preference = scores.detach() if self.bias is None else scores.detach() + self.bias
        chosen = preference.topk(self.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all vanish
        return weights, chosen


class Experts(nn.Module):
    """X SwiGLU blocks as three stacked matrices: gate and up (X, F, E), down (X, E, F)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        X, ffn, E = spec.experts, spec.expert_ffn, spec.width
        self.gate = nn.Parameter(torch.empty(X, ffn, E))
        self.up = nn.Parameter(torch.empty(X, ffn, E))
        self.down = nn.Parameter(torch.empty(X, E, ffn))

    def forward(self, rows: Tensor, counts: Tensor, weight: Callable[[Tensor], Tensor] = same) -> Tensor:
        """Each of rows (N, E) through its expert; the first counts[0] are the first expert's, and so on.

        `weight` gives what to multiply with for a parameter, where a rank holds only some of the experts.
        """
        if grouped.few_sizes_pay(rows, counts):
            padded, places, sizes = grouped.round_up(rows, counts)
            return self._apart(padded, sizes, weight).index_select(0, places)
        return self._apart(rows, counts, weight)

    def _apart(self, rows: Tensor, counts: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
        gate, up, down = weight(self.gate), weight(self.up), weight(self.down)
        hidden = F.silu(grouped.linear(rows, gate, counts)) * grouped.linear(rows, up, counts)  # (N, F)
        return grouped.linear(hidden, down, counts)


Exchange = Callable[[Experts, Tensor, Tensor], Tensor]
"""Runs experts on rows (N, E) sorted by expert, with counts (X,) int64, wherever the experts are: (N, E)."""


class MoE(nn.Module):
    """The feed-forward block of a layer with experts (Shazeer et al. 2017)."""

    exchange: Exchange | None
    sum_over_sequence: Callable[[Tensor], Tensor]

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.router = Router(spec)
        self.experts = Experts(spec)
        self.shared = MLP(spec, spec.shared_ffn) if spec.shared_ffn else None
        self.exchange = None
        """Expert parallelism; None where all experts are on this rank."""
        self.sum_over_sequence = same
        """Sums counts (B, X) int64 over the ranks that a sequence is spread over."""
        self.aux_scale = 0.0
        """What a backward pass adds: this times the balance loss summed over sequences. 0: no such loss."""
        self.counting = True
        """Whether forward passes that record gradients add to `load`; not where they repeat an earlier one."""
        self.reset_load()

    def reset_load(self) -> None:
        """Begin to count the load anew."""
        # Never on meta, whatever device the model is made on: it starts as numbers.
        self.load = torch.zeros(len(self.router.weight), dtype=torch.int64, device="cpu")
        """Tokens that this rank sent to each expert in training, (X,) int64."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)  # (B, T, X)
        weights, chosen = self.router.choose(scores)  # (B, T, k)
        counts = _tally(chosen, scores.shape[-1])  # (B, X)
        load = counts.sum(0)  # (X,)
        training = torch.is_grad_enabled()
        if self.counting and training:  # the load of a step is not that of an evaluation before it
            self.load = self.load.to(load.device) + load
        if self.aux_scale and training:
            loss = balance.sequence_balance_loss(scores, self.sum_over_sequence(counts))
            weights = balance.attach(weights, loss, self.aux_scale)
        out = self._through_experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(), load)
        out = out.view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def _through_experts(self, x: Tensor, weights: Tensor, chosen: Tensor, load: Tensor) -> Tensor:
        """The chosen experts' weighted sum (N, E) for x (N, E), weights (N, k), chosen (N*k,) and load (X,)."""
        copies = weights.shape[1]
        order, place = sorting(chosen)
        rows = take(x, order, place, copies)  # (N*k, E) sorted by expert
        out = self.experts(rows, load) if self.exchange is None else self.exchange(self.experts, rows, load)
        out = take(out, place, order, 1).view(-1, copies, x.shape[1])  # (N*k, E) -> (N, k, E)
        return (out * weights.to(out.dtype)[..., None]).sum(1)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _tally(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert occurs in each row of chosen (B, T, k): (B, X) int64, without waiting for the device."""
    flat = chosen.flatten(1)
    counts = torch.zeros(len(flat), experts, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def sorting(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts rows of groups (N,), keeping that of equals, and its inverse: where each row goes."""
    order = groups.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place


def take(source: Tensor, index: Tensor, place: Tensor, copies: int) -> Tensor:
    """Rows of source (N, E), each `copies` times, in the order that `index` (N*copies,) gives the copies.

    `place` is the inverse of `index`.
    """
    taken: Tensor = _Take.apply(source, index, place, copies)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """The backward pass is a gather and a sum too. That of index_select adds rows up in whatever order a GPU comes
    to them, and would make two equal runs differ."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return source.index_select(0, index if copies == 1 else index // copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        rows = gradients[0].index_select(0, place)  # in the order of source's copies
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, rows.shape[1]).sum(1)
        return rows, None, None, None
