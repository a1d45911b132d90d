"""Mixture of experts: each token goes through the few experts that its router chooses. No token is dropped.

Whether all experts are here (`MoE.exchange`) and whether all of a sequence is (`MoE.sum_over_sequence`) is said from
outside; nothing here knows of ranks. B batch, T tokens, N rows, E embed, F ffn of an expert, X experts,
k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muster.model import balance
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
        into, out_of = (
            (spec.experts, spec.expert_ffn, spec.width),
            (spec.experts, spec.width, spec.expert_ffn),
        )
        self.gate = nn.Parameter(torch.empty(into))
        self.up = nn.Parameter(torch.empty(into))
        self.down = nn.Parameter(torch.empty(out_of))

    def forward(self, rows: Tensor, counts: Tensor, weight: Callable[[Tensor], Tensor] = same) -> Tensor:
        """Each of rows (N, E) through its expert; the first counts[0] are the first expert's, and so on.

        `weight` gives what to multiply with for a parameter, where a rank holds only some of the experts.
        """
        gate, up, down = weight(self.gate), weight(self.up), weight(self.down)
        hidden = F.silu(grouped_linear(rows, gate, counts)) * grouped_linear(rows, up, counts)  # (N, F)
        return grouped_linear(hidden, down, counts)


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
        """Whether forward passes add to `load`; not while activations are computed a second time."""
        self.reset_load()

    def reset_load(self) -> None:
        """Begin to count the load anew."""
        # Never on meta, whatever device the model is made on: it starts as numbers.
        self.load = torch.zeros(len(self.router.weight), dtype=torch.int64, device="cpu")
        """Tokens sent to each expert by this rank, (X,) int64."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)  # (B, T, X)
        weights, chosen = self.router.choose(scores)  # (B, T, k)
        counts = _tally(chosen, scores.shape[-1])  # (B, X)
        load = counts.sum(0)  # (X,)
        if self.counting:
            self.load = self.load.to(load.device) + load
        if self.aux_scale and torch.is_grad_enabled():
            loss = balance.sequence_balance_loss(scores, self.sum_over_sequence(counts))
            weights = balance.attach(weights, loss, self.aux_scale)
        out = self._through_experts(x.flatten(0, 1), weights.flatten(0, 1), chosen.flatten(), load)
        out = out.view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def _through_experts(self, x: Tensor, weights: Tensor, chosen: Tensor, load: Tensor) -> Tensor:
        """The chosen experts' weighted sum (N, E) for x (N, E), weights (N, k), chosen (N*k,) and load (X,)."""
        copies = weights.shape[1]
        order = chosen.argsort(stable=True)  # by expert, then by token
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        rows = take(x, order, place, copies)  # (N*k, E) sorted by expert
        out = self.experts(rows, load) if self.exchange is None else self.exchange(self.experts, rows, load)
        out = take(out, place, order, 1).view(-1, copies, x.shape[1])  # (N*k, E) -> (N, k, E)
        return (out * weights.to(out.dtype)[..., None]).sum(1)


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """The layers in `module` do not count their load: for a forward pass that only repeats an earlier one."""
    layers = [layer for layer in module.modules() if isinstance(layer, MoE)]
    before = [layer.counting for layer in layers]
    for layer in layers:
        layer.counting = False
    try:
        yield
    finally:
        for layer, counting in zip(layers, before, strict=True):
            layer.counting = counting


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (N, I) times their groups' weights (X, O, I), in runs of counts (X,) rows: (N, O)."""
    # One kernel and no wait for the counts; also on CPU it is the faster way (measured with torch 2.13, fp32 and bf16,
    # 4 to 64 experts: 1.05 to 2 times a loop). It wants rows of whole 16 bytes.
    if all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:]):
        ends = counts.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    groups = zip(torch.split(rows, counts.tolist()), weight.unbind(), strict=True)
    return torch.cat([F.linear(group, matrix) for group, matrix in groups])


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _tally(chosen: Tensor, experts: int) -> Tensor:
    """How often each expert occurs in each row of chosen (B, T, k): (B, X) int64, without waiting for the device."""
    flat = chosen.flatten(1)
    counts = torch.zeros(len(flat), experts, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


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
