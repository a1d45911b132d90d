"""Silent corruption: ranks that hold the same part of a tensor must hold the same bits.

Copies are compared wherever a layout has them: over the axis replicate, over the tensor axis for what it does
not divide, and between stages for a tied embedding. A part that one rank alone holds (all
of them under ZeRO 1 to 3 without `replicate`) has nothing to be compared with.

Each rank folds its tensors into one number for each set of ranks it shares parts with, and those few numbers are
all that is sent, unless they differ. Which ranks share what is told once, at the first check.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from muster.errors import TrainingError
from muster.parallel.world import World

_COLUMNS = 1024
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as int64: 2^64 over the golden ratio
_SENTENCE_BYTES = 512


def fingerprint(tensor: Tensor) -> Tensor:
    """A number (int64, on the tensor's device) that follows from every bit of a tensor and their order.

    Sums of rows and columns of 64-bit words, each times a number of its own, modulo 2^64. One flipped bit changes it
    for certain: a row's number is odd and a column's even, so their sum is odd, and odd x 2^k is never 0.
    """
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    tail = flat.new_zeros(8)
    tail[: flat.numel() - whole] = flat[whole:]
    words = torch.cat(
        (flat[:whole].view(torch.int64)[whole // 8 // _COLUMNS * _COLUMNS :], tail.view(torch.int64))
    )
    table = flat[: whole // 8 // _COLUMNS * _COLUMNS * 8].view(torch.int64).view(-1, _COLUMNS)
    rest = fold(words)
    if not len(table):
        return rest
    return fold(table.sum(1)) + 2 * fold(table.sum(0)) + _MULTIPLIER * rest


def fold(words: Tensor) -> Tensor:
    """The sum of int64 words (N,), each times an odd number of its own, modulo 2^64."""
    order = torch.arange(1, 2 * len(words), 2, device=words.device)
    return (words * (order * _MULTIPLIER)).sum()


def odd_ones_out(prints: Mapping[int, int]) -> list[int]:
    """Given the fingerprint of each rank that holds a part, the ranks that are wrong: those outside the majority.

    Where there is no majority nobody can tell, and all are named; where all agree, none.
    """
    (most, number), *others = Counter(prints.values()).most_common()
    if not others:
        return []
    return [rank for rank, value in prints.items() if value != most or 2 * number <= len(prints)]


class Copies:
    """Compares the copies of one set of tensors, again and again."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._map: _Map | None = None

    def check(self, tensors: Sequence[tuple[str, Tensor]], step: int) -> None:
        """TrainingError names the ranks and the tensor where copies differ; all ranks call it, and all raise.

        `tensors` by the names of the undivided model's, a name twice where a rank holds two copies; always the same.
        """
        if self._world.size == 1:
            return
        if self._map is None:
            self._map = _Map(self._gather(torch.tensor([_key(*named) for named in _told_apart(tensors)])))
        shared = self._map
        if not shared.groups:
            return
        prints = torch.stack([fingerprint(_local(tensor)).to(self._world.device) for _, tensor in tensors])
        members = shared.members(self._world.rank)
        own = [fold(prints[torch.tensor(indices, device=prints.device)]) for indices in members.values()]
        told = self._gather(torch.stack(own) if own else prints[:0])
        if shared.differing(told):
            self._accuse(tensors, prints, step, shared)

    def _accuse(self, tensors: Sequence[tuple[str, Tensor]], prints: Tensor, step: int, shared: _Map) -> None:
        wrong = shared.wrong(self._gather(prints))
        odd, holders, (rank, index), more = wrong
        name = torch.zeros(_SENTENCE_BYTES, dtype=torch.uint8, device=self._world.device)
        if rank == self._world.rank:
            said = tensors[index][0].encode()[:_SENTENCE_BYTES]
            name[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        dist.broadcast(name, rank)
        tensor = bytes(name.tolist()).rstrip(b"\0").decode()
        others = f" (and of {more} more tensors)" if more else ""
        if odd == holders:
            blame = f"{_ranks(holders)} hold different bits of {tensor}{others}, and no majority says who is right"
        else:
            rest = [rank for rank in holders if rank not in odd]
            blame = f"{_ranks(odd)} holds other bits of {tensor}{others} than its copies on {_ranks(rest)}"
        raise TrainingError(
            f"step {step}: {blame}: memory or arithmetic failed there; run the same command again to go on from "
            f"the newest checkpoint, whose copies agreed, and leave that machine out if it happens again"
        )

    def _gather(self, own: Tensor) -> list[list[int]]:
        """The int64 numbers of every rank, which may have different many of them."""
        own = own.to(self._world.device)
        lengths = [int(length) for length in self._world.sum(*self._in_own_place(len(own)))]
        padded = own.new_zeros(max(lengths))
        padded[: len(own)] = own
        told = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(told, padded)
        return [row.tolist()[:length] for row, length in zip(told, lengths, strict=True)]

    def _in_own_place(self, value: int) -> list[int]:
        return [value * (rank == self._world.rank) for rank in range(self._world.size)]


class _Map:
    """Who holds the same parts, from the keys of each rank's parts; equal on every rank."""

    def __init__(self, keys: list[list[int]]) -> None:
        self._keys = keys
        holders: dict[int, list[tuple[int, int]]] = {}
        for rank, row in enumerate(keys):
            for index, key in enumerate(row):
                holders.setdefault(key, []).append((rank, index))
        self._shared = {key: places for key, places in holders.items() if len(places) > 1}
        self.groups = sorted({tuple(rank for rank, _ in places) for places in self._shared.values()})

    def members(self, rank: int) -> dict[tuple[int, ...], list[int]]:
        """The tensors of a rank, by index, that it shares with each group of ranks, in an order all groups agree on."""
        found: dict[tuple[int, ...], list[int]] = {group: [] for group in self.groups if rank in group}
        for _, places in sorted(self._shared.items()):
            index = dict(places).get(rank)
            if index is not None:
                found[tuple(rank for rank, _ in places)].append(index)
        return found

    def differing(self, told: list[list[int]]) -> bool:
        """Whether the numbers that the ranks of any group folded differ."""
        by_group: dict[tuple[int, ...], set[int]] = {}
        for rank, row in enumerate(told):
            own = [group for group in self.groups if rank in group]
            for group, value in zip(own, row, strict=True):
                by_group.setdefault(group, set()).add(value)
        return any(len(values) > 1 for values in by_group.values())

    def wrong(self, prints: list[list[int]]) -> tuple[list[int], list[int], tuple[int, int], int]:
        """Of the first tensor that differs: ranks at fault, all its holders, where to find it; and how many more do."""
        found = []
        for places in self._shared.values():
            odd = odd_ones_out({rank: prints[rank][index] for rank, index in places})
            if odd:
                found.append((min(place for place in places if place[0] in odd), odd, [r for r, _ in places]))
        place, odd, holders = min(found, key=lambda entry: (entry[0][1], entry[0][0]))
        return odd, holders, place, len(found) - 1


def _told_apart(tensors: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    seen: Counter[str] = Counter()
    apart = []
    for name, tensor in tensors:
        seen[name] += 1
        apart.append((f"{name} {seen[name]}", tensor))
    return apart


def _key(name: str, tensor: Tensor) -> int:
    """A number for one part of one tensor, the same on all ranks that hold it."""
    part = [(list(tensor.shape), [0] * tensor.ndim)]
    if isinstance(tensor, DTensor):
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        part = [(list(chunk.sizes), list(chunk.offsets)) for chunk in chunks]
    digest = hashlib.blake2b(f"{name} {part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
