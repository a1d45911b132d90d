"""From a step's plan to tensors and back to logits; owns the cache, and knows nothing of requests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from muster.serve.engine.batch import NOBODY, Batch, Network, PagedCache
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
    """The tensors of some works, on the CPU: views of one array, as each of its own would cost as much again."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lengths = [0], [work.start + work.rows for work in works]
    wanted: list[int] = []
    pages = -(-max(lengths) // block_tokens)
    table, padding = array("q"), array("q", bytes(8 * pages))
    for work, length in zip(works, lengths, strict=True):
        blocks, new = work.sequence.blocks, range(work.start, length)
        tokens += work.sequence.tokens[work.start : work.stop]
        tokens += work.draft
        positions += new
        slots += [blocks[at // block_tokens] * block_tokens + at % block_tokens for at in new]
        starts.append(len(tokens))
        table += blocks[:pages]
        table += padding[: max(0, pages - len(blocks))]
        if work.draws:
            wanted += range(len(tokens) - 1 - len(work.draft), len(tokens))
    parts = (tokens, positions, slots, starts, lengths, wanted)
    numbers = table + array("q", [number for part in parts for number in part])
    sizes = [len(table), *map(len, parts)]
    made = torch.frombuffer(numbers, dtype=torch.int64).split_with_sizes(sizes)
    return Batch(
        table=made[0].view(len(works), pages),
        tokens=made[1],
        positions=made[2],
        slots=made[3],
        starts=made[4],
        lengths=made[5],
        wanted=made[6],
        adapted=_adapted(works, starts),
    )


def _adapted(works: Sequence[Work], starts: Sequence[int]) -> Tensor:
    """(A, 3) runs of works with the same adapter: its number and their rows."""
    runs: list[tuple[int, int, int]] = []
    end = 0
    for adapter, group in groupby(works, lambda work: work.sequence.adapter):
        first, end = end, end + len(list(group))
        if adapter:
            runs.append((adapter, starts[first], starts[end]))
    return torch.tensor(runs, dtype=torch.int64).view(-1, 3) if runs else NOBODY
