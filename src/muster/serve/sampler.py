"""From logits to tokens: pure functions over (B, V) logits, one setting a row.

A row's draw depends on its own logits, its seed and its position in its own sequence, never on its
neighbours in the batch or on a generator's history: that makes seeds reproducible in a crowd, and
lets another replica continue a half-finished sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: the division would only overflow towards the same token."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What one row of a batch asks of the sampler."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    """Number of tokens this sequence has generated so far."""


def sample(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Choose one token a row. logits (B, V) float, one `Draw` a row -> token ids (B,) int64."""
    tokens = logits.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.temperature >= GREEDY_BELOW]
    if rows:
        chosen = [draws[row] for row in rows]
        scaled = scale(logits[rows].float(), [draw.temperature for draw in chosen])
        kept = keep_top(scaled, [draw.top_k for draw in chosen], [draw.top_p for draw in chosen])
        tokens[rows] = invert_cdf(
            kept.softmax(dim=-1), [uniform(draw.seed, draw.position) for draw in chosen]
        )
    return tokens


def scale(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(B, V) logits divided by their row's temperature; maxima move to 0 first, so nothing overflows."""
    divisor = logits.new_tensor(temperatures).unsqueeze(-1)
    return (logits - logits.amax(dim=-1, keepdim=True)) / divisor


def keep_top(logits: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """Set to -inf what top-k, then top-p (nucleus, Holtzman et al. 2020) leave out.

    logits (B, V); `top_k` 0 and `top_p` 1.0 keep everything. The most likely token always stays, and
    exactly k tokens stay under top-k: ties go to the smaller token id.
    """
    if all(k == 0 for k in top_k) and all(p >= 1.0 for p in top_p):
        return logits
    vocab = logits.shape[-1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)  # (B, V) both
    rank = torch.arange(vocab, device=logits.device)  # (V,)
    k = torch.tensor([k or vocab for k in top_k], device=logits.device).unsqueeze(-1)  # (B, 1)
    ordered = ordered.masked_fill(rank >= k, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    p = logits.new_tensor([torch.inf if p >= 1.0 else p for p in top_p]).unsqueeze(-1)
    ordered = ordered.masked_fill((before >= p) & (rank > 0), -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered)


def invert_cdf(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw from each row of (B, V) probabilities with one uniform number a row -> (B,) int64."""
    cdf = probabilities.double().cumsum(dim=-1)
    target = cdf.new_tensor(uniforms).unsqueeze(-1) * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)  # right: never a token of probability 0


def uniform(seed: int, position: int) -> float:
    """The `position`-th number in [0, 1) of a seed's sequence: SplitMix64 (Steele et al. 2014) as a hash.

    40 bits, so that the product with a cumulative sum stays below the sum itself.
    """
    return (_splitmix64(_splitmix64(seed & _MASK) + position) >> 24) / (1 << 40)


def _splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of `token`, and the `count` most likely tokens with theirs, of raw logits (V,)."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(logprobs[token]), tuple((int(id), float(value)) for id, value in pairs)
