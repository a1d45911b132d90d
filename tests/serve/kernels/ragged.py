"""Batches of some sequences' last tokens over randomly placed blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muster.serve.engine.batch import Batch


def ragged(sequences: Sequence[Tensor], new: Sequence[int], table: Tensor, block_tokens: int) -> Batch:
    """The last new[s] tokens of each of `sequences`, all logits wanted."""
    counts, lengths = torch.tensor(new), torch.tensor([len(tokens) for tokens in sequences])
    positions = torch.cat(
        [torch.arange(len(tokens) - n, len(tokens)) for tokens, n in zip(sequences, new, strict=True)]
    )
    owner = torch.repeat_interleave(torch.arange(len(sequences)), counts)
    return Batch(
        tokens=torch.cat([tokens[len(tokens) - n :] for tokens, n in zip(sequences, new, strict=True)]),
        positions=positions,
        slots=table[owner, positions // block_tokens] * block_tokens + positions % block_tokens,
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        lengths=lengths,
        table=table,
        wanted=torch.arange(int(counts.sum())),
    )


def random_table(sequences: int, tokens: int, block_tokens: int) -> Tensor:
    """Blocks for sequences of up to `tokens` tokens, in no order."""
    pages = -(-tokens // block_tokens)
    return torch.randperm(sequences * pages).view(sequences, pages)
