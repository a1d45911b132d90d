"""What one step of the engine computes, as tensors: several sequences' new tokens in a row, and the cache's pages.

Sequences of different lengths lie one after the other (ragged), prompts' chunks and single tokens alike, so that a
step is one pass whatever it mixes. Shapes: N new tokens, S sequences, P pages a sequence at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from muster.errors import MusterError
from muster.serve.engine.blocks import Chore, Copy

NOBODY = torch.empty(0, 3, dtype=torch.int64)
"""No rows of adapters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """New tokens of S sequences and where their keys and values live. Tensors are int64 and contiguous, made on
    the CPU; a sequence's new tokens are the last ones of its length."""

    tokens: Tensor
    """(N,) token ids."""
    positions: Tensor
    """(N,) where each stands in its sequence."""
    slots: Tensor
    """(N,) where each token's key and value go: block * block_tokens + offset."""
    starts: Tensor
    """(S + 1,) the new tokens of sequence s are starts[s] : starts[s + 1]."""
    lengths: Tensor
    """(S,) tokens of each sequence, the new ones included."""
    table: Tensor
    """(S, P) each sequence's blocks in order, padded with 0."""
    wanted: Tensor
    """(W,) rows of the N whose logits are asked for."""
    adapted: Tensor = NOBODY
    """(A, 3) an adapter's number, counted from 1, and its rows: the first, and the one after the last. On the CPU."""

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each sequence, all of them wanted, and of the model alone."""
        return len(self.tokens) == len(self.lengths) == len(self.wanted) and not len(self.adapted)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device."""
        if self.tokens.device == torch.device(device):
            return self
        names = ("tokens", "positions", "slots", "starts", "lengths", "table", "wanted")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedCache:
    """Keys and values of all layers in blocks of equally many tokens (PagedAttention, Kwon et al. 2023)."""

    keys: tuple[Tensor, ...]
    """One a layer: (blocks, K, block_tokens, D); or D + 4 where it is int8 (`kernels/pages.py`)."""
    values: tuple[Tensor, ...]

    @property
    def block_tokens(self) -> int:
        return self.keys[0].shape[2]


def carry_out(chores: Sequence[Chore], cache: PagedCache) -> None:
    """Copy and wipe blocks, in order."""
    for chore in chores:
        for tensors in (cache.keys, cache.values):
            for layer in tensors:
                if isinstance(chore, Copy):
                    layer[chore.target] = layer[chore.source]
                else:
                    layer[chore.target].zero_()


class NetworkLost(MusterError):
    """The network will not compute any more, whatever it is asked: no request's fault."""


class Network(Protocol):
    """A model as the engine sees it."""

    def prepare(self, chores: Sequence[Chore], cache: PagedCache) -> None:
        """Copy and wipe blocks, in order, before the next `logits`."""
        ...

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        """Write the batch's keys and values into `cache`; fp32 logits (W, V) of its wanted rows. A row's logits are
        the same, up to the dtype's rounding, whatever else is in the batch."""
        ...

    def last_hidden(self, batch: Batch, cache: PagedCache) -> Tensor:
        """The same, but for what the logits are made from: the wanted rows' last hidden states (W, E)."""
        ...
