"""A network over several ranks: the first has the engine, the others follow its orders with their parts of the model.

Ranks are numbered as in training: pipeline stages of `tensor` ranks each. A step is one order, the batch as numbers, to
all; every stage computes in its turn and hands hidden states on; what the last one makes of them comes back to
the first rank. Orders have a process group of their own, in which ranks wait for as long as nobody asks for anything;
a step's own exchanges end with an error after `STEP_S`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from muster.parallel import vocabulary
from muster.serve.engine.batch import Batch, NetworkLost, PagedCache, carry_out
from muster.serve.engine.blocks import Chore, Copy, Wipe
from muster.serve.engine.network import TransformerNetwork
from muster.serve.weights import load_if_there

_LOG = logging.getLogger(__name__)

STEP_S = 120.0
"""Longest time that one rank waits for another within a step."""
_FOREVER = timedelta(days=3650)
_ARRAYS = 9
"""Of a step: chores, and the eight tensors of a batch."""

Load = Callable[[str], TransformerNetwork]
"""A rank's part of the model in a folder."""


class Kind(IntEnum):
    """What an order asks for."""

    LOGITS = 0
    """A step,"""
    HIDDEN = 1
    """and one of which the last hidden states are wanted."""
    LOAD = 2
    """Begin to load other weights, beside the steps that come."""
    TAKE = 3
    """Compute with them from now on, if every rank has them."""
    END = 4


class Grid:
    """This rank's place among the others, and what it exchanges with them in a step."""

    def __init__(self, tensor: int, pipeline: int) -> None:
        self.tensor, self.pipeline = tensor, pipeline
        self.rank = dist.get_rank()
        self.stage, self.index = divmod(self.rank, tensor)
        self._group: dist.ProcessGroup | None = None
        for stage in range(pipeline if tensor > 1 else 0):
            group = dist.new_group(list(range(stage * tensor, (stage + 1) * tensor)))
            if stage == self.stage:
                self._group = group

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks of this stage, in place."""
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x

    @torch.inference_mode()
    def compute(
        self, network: TransformerNetwork, batch: Batch, cache: PagedCache, kind: Kind
    ) -> Tensor | None:
        """This rank's part of a step. On the first rank logits (W, V) or hidden states (W, E), else None."""
        if self.stage == 0:
            x = network.embedded(batch)
        else:
            x = torch.empty(len(batch.tokens), network.spec.width, dtype=network.compute)
            dist.recv(x, self.rank - self.tensor)
        x, residual = network.through(batch, cache, x)
        own: Tensor | None = None
        if self.stage < self.pipeline - 1:
            dist.send(x.add_(residual), self.rank + self.tensor)
        elif len(batch.wanted):
            own = network.final(batch, x, residual)
            if kind == Kind.LOGITS:
                own = network.scored(own)
        rows = len(batch.wanted)
        if kind == Kind.LOGITS:
            return self._gathered(own, rows, network.part.whole.vocab)
        return self._sent(own, torch.empty(rows, network.spec.width, dtype=network.compute))

    def _sent(self, own: Tensor | None, room: Tensor) -> Tensor | None:
        """Hidden states, which all ranks of the last stage have, on the first rank."""
        source = (self.pipeline - 1) * self.tensor
        if self.rank == 0 and source and len(room):
            dist.recv(room, source)
        elif self.rank == source and own is not None:
            if source == 0:
                return own
            dist.send(own, 0)
        return None if self.rank else room

    def _gathered(self, own: Tensor | None, rows: int, vocab: int) -> Tensor | None:
        """Logits of the last stage's ranks, (W, V) on the first rank."""
        if self.rank:
            if own is not None:
                dist.send(own, 0)
            return None
        logits = torch.empty(rows, vocab)
        if rows:
            pieces = vocabulary.parts(vocab, self.tensor)
            for index, piece in enumerate(pieces):
                source = (self.pipeline - 1) * self.tensor + index
                if source:
                    own = torch.empty(rows, len(piece))
                    dist.recv(own, source)
                assert own is not None
                logits[:, piece.start : piece.stop] = own
        return logits


class Orders:
    """From the first rank to all others, as int64 numbers: how many of each, then all of them."""

    def __init__(self) -> None:
        self._group = dist.new_group(timeout=_FOREVER)

    def give(self, kind: Kind, *arrays: Tensor) -> None:
        """The first rank's side."""
        sizes = torch.zeros(1 + _ARRAYS, dtype=torch.int64)
        sizes[0] = kind
        sizes[1 : 1 + len(arrays)] = torch.tensor([array.numel() for array in arrays])
        dist.broadcast(sizes, 0, group=self._group)
        if sizes[1:].any():
            dist.broadcast(torch.cat([array.flatten() for array in arrays]), 0, group=self._group)

    def take(self) -> tuple[Kind, Sequence[Tensor]]:
        """The others' side; waits for the next order."""
        sizes = torch.zeros(1 + _ARRAYS, dtype=torch.int64)
        dist.broadcast(sizes, 0, group=self._group)
        kind, *counts = sizes.tolist()
        numbers = torch.empty(sum(counts), dtype=torch.int64)
        if len(numbers):
            dist.broadcast(numbers, 0, group=self._group)
        return Kind(kind), torch.split(numbers, counts)

    def agree(self, fine: bool) -> bool:
        """Whether all ranks say so; each waits for the others."""
        others = torch.tensor([int(not fine)])
        dist.all_reduce(others, group=self._group)
        return not others.item()


def load_together(
    orders: Orders, load: Load, folder: str | None = None, *, may_go: bool
) -> TransformerNetwork | None:
    """Every rank's part of the model in the folder that the first rank says; None on all where it is gone.

    It is an order, so that all read the same where a training that goes on deletes its old checkpoints (`may_go`).
    """
    if folder is not None:
        orders.give(Kind.LOAD, _letters(folder))
    else:
        folder = _word(orders.take()[1][0])
    network = load_if_there(load, folder, may_go=may_go)
    return network if orders.agree(network is not None) else None


class Loading:
    """Another network on its way, on a thread."""

    def __init__(self, load: Load, folder: str) -> None:
        self._load, self._folder = load, folder
        self._network: TransformerNetwork | None = None
        self._thread = threading.Thread(target=self._run, name="muster-loading", daemon=True)
        self._thread.start()

    def result(self) -> TransformerNetwork | None:
        """Waits for it; None where that failed."""
        self._thread.join()
        return self._network

    def _run(self) -> None:
        try:
            self._network = self._load(self._folder)
        except Exception as error:  # files that were deleted meanwhile; the old weights serve on
            _LOG.error("%s cannot be loaded", self._folder, exc_info=error)


class ParallelNetwork:
    """The engine's `Network` on the first rank. NetworkLost when a step fails on any of the ranks."""

    def __init__(self, network: TransformerNetwork, grid: Grid, orders: Orders) -> None:
        self._network, self._grid, self._orders = network, grid, orders
        self._chores: list[Chore] = []

    def prepare(self, chores: Sequence[Chore], cache: PagedCache) -> None:
        self._chores += chores  # on their way with the step

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        return self._step(Kind.LOGITS, batch, cache)

    def last_hidden(self, batch: Batch, cache: PagedCache) -> Tensor:
        return self._step(Kind.HIDDEN, batch, cache)

    def _step(self, kind: Kind, batch: Batch, cache: PagedCache) -> Tensor:
        self._network.check(batch, cache)
        chores, self._chores = self._chores, []
        try:
            self._orders.give(kind, _chore_numbers(chores), *_arrays(batch))
            carry_out(chores, cache)
            found = self._grid.compute(self._network, batch, cache, kind)
        except Exception as error:
            raise NetworkLost(f"a step over {dist.get_world_size()} ranks failed ({error})") from error
        assert found is not None
        return found

    def load(self, folder: str) -> None:
        """Have the other ranks begin to load what is in a folder."""
        self._orders.give(Kind.LOAD, _letters(folder))

    def renew(self, network: TransformerNetwork | None) -> bool:
        """All ranks take what they have loaded, this one `network`; False where one of them has nothing."""
        self._orders.give(Kind.TAKE)
        if not self._orders.agree(network is not None) or network is None:
            return False
        self._network = network
        return True

    def end(self) -> None:
        """Let the other ranks go."""
        self._orders.give(Kind.END)


def follow(network: TransformerNetwork, cache: PagedCache, grid: Grid, orders: Orders, load: Load) -> None:
    """What a rank other than the first does, until it is let go."""
    loading: Loading | None = None
    while True:
        kind, arrays = orders.take()
        if kind == Kind.END:
            return
        if kind == Kind.LOAD:
            loading = Loading(load, _word(arrays[0]))
        elif kind == Kind.TAKE:
            fresh = None if loading is None else loading.result()
            if orders.agree(fresh is not None) and fresh is not None:
                network = fresh
            loading = None
        else:
            carry_out(_chores(arrays[0]), cache)
            grid.compute(network, _batch(arrays[1:]), cache, kind)


def _letters(word: str) -> Tensor:
    return torch.tensor(list(word.encode()), dtype=torch.int64)


def _word(letters: Tensor) -> str:
    return bytes(letters.tolist()).decode()


def _arrays(batch: Batch) -> tuple[Tensor, ...]:
    return (
        batch.tokens, batch.positions, batch.slots, batch.starts, batch.lengths, batch.table, batch.wanted,
        batch.adapted,
    )  # fmt: skip


def _batch(arrays: Sequence[Tensor]) -> Batch:
    tokens, positions, slots, starts, lengths, table, wanted, adapted = arrays
    return Batch(
        tokens=tokens,
        positions=positions,
        slots=slots,
        starts=starts,
        lengths=lengths,
        table=table.view(len(lengths), -1),
        wanted=wanted,
        adapted=adapted.view(-1, 3),
    )


def _chore_numbers(chores: Sequence[Chore]) -> Tensor:
    """(chores, 2): source, or -1 to wipe, and target."""
    pairs = [(chore.source if isinstance(chore, Copy) else -1, chore.target) for chore in chores]
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def _chores(numbers: Tensor) -> list[Chore]:
    return [
        Wipe(target) if source < 0 else Copy(source, target)
        for source, target in numbers.view(-1, 2).tolist()
    ]
