"""Plain generation for tests and checks; serving has an engine of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from muster.model.cache import KVCache
from muster.model.transformer import Transformer


def greedy(logits: Tensor) -> Tensor:
    """The most likely token (B,) of logits (B, V)."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    model: Transformer, tokens: Tensor, new_tokens: int, choose: Callable[[Tensor], Tensor] = greedy
) -> Tensor:
    """Continue tokens (B, T) by `new_tokens` tokens, each chosen from its logits: (B, T + new_tokens)."""
    weight = next(model.parameters())
    length = tokens.shape[1] + new_tokens
    cache = KVCache(model.spec, tokens.shape[0], capacity=length, dtype=weight.dtype, device=weight.device)
    rows = cache.select(range(tokens.shape[0]))
    fresh = tokens
    for _ in range(new_tokens):
        fresh = choose(model(fresh, cache=rows)[:, -1])[:, None]  # (B, 1)
        tokens = torch.cat([tokens, fresh], dim=1)
    return tokens
