"""From a step's plan to tensors and back to logits; owns the cache, and knows nothing of requests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muster.serve.engine.batch import Batch, Network, PagedCache
from muster.serve.engine.blocks import Chore
from muster.serve.engine.scheduler import Work


class Runner:
    """Computes works on a network. Logits from `vocab` on (padding of the embedding matrix) are left out."""

    def __init__(self, network: Network, cache: PagedCache, *, vocab: int | None = None) -> None:
        self._network, self._cache, self._vocab = network, cache, vocab

    def renew(self, network: Network) -> None:
        """Compute with another network, over the same cache."""
        self._network = network

    def prepare(self, chores: Sequence[Chore]) -> None:
        """Copy and wipe blocks, in order."""
        self._network.prepare(chores, self._cache)

    def run(self, works: Sequence[Work], *, hidden: bool = False) -> Tensor:
        """Logits (W, V) fp32: for each work that draws, its last token's row and one for each guess. `hidden`: instead
        the last hidden states (W, E) that they come from."""
        batch = make_batch(works, self._cache.block_tokens)
        if hidden:
            return self._network.last_hidden(batch, self._cache)
        logits = self._network.logits(batch, self._cache)
        return logits if self._vocab is None else logits[:, : self._vocab]


def make_batch(works: Sequence[Work], block_tokens: int) -> Batch:
    """The tensors of some works, on the CPU."""
    tokens: list[int] = []
    wanted: list[int] = []
    for work in works:
        tokens += work.sequence.tokens[work.start : work.stop]
        first = len(tokens) - 1
        tokens += work.draft
        if work.draws:
            wanted += range(first, len(tokens))
    rows = np.array([work.rows for work in works], dtype=np.int64)  # (S,)
    firsts = np.array([work.start for work in works], dtype=np.int64)
    starts = np.zeros(len(works) + 1, dtype=np.int64)
    rows.cumsum(out=starts[1:])
    lengths = firsts + rows
    owners = [work.sequence.adapter for work in works]
    pages = -(-int(lengths.max()) // block_tokens)
    blocks, padding = array("q"), array("q", bytes(8 * pages))
    for work in works:
        blocks += work.sequence.blocks[:pages]
        blocks += padding[: max(0, pages - len(work.sequence.blocks))]
    table = np.frombuffer(blocks, dtype=np.int64).reshape(len(works), pages)  # (S, P)
    owner = np.repeat(np.arange(len(works)), rows)  # (N,) whose each token is
    positions = np.arange(len(tokens)) - (starts[:-1] - firsts)[owner]
    slots = table[owner, positions // block_tokens] * block_tokens + positions % block_tokens
    arrays = (np.array(tokens, dtype=np.int64), positions, slots, starts, lengths, table)
    made = [torch.from_numpy(one) for one in (*arrays, np.array(wanted, dtype=np.int64))]
    return Batch(
        adapted=_adapted(owners, starts),
        tokens=made[0],
        positions=made[1],
        slots=made[2],
        starts=made[3],
        lengths=made[4],
        table=made[5],
        wanted=made[6],
    )


def _adapted(adapters: Sequence[int], starts: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    """(A, 3) runs of works with the same adapter: its number and their rows."""
    runs: list[tuple[int, int, int]] = []
    end = 0
    for adapter, group in groupby(adapters):
        first, end = end, end + len(list(group))
        if adapter:
            runs.append((adapter, int(starts[first]), int(starts[end])))
    return torch.tensor(runs, dtype=torch.int64).view(-1, 3)
