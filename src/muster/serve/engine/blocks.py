"""The pool of KV blocks: who holds which, and which of them hold tokens that another sequence may begin with.

A block that nobody holds keeps its content until it is needed for something else, so that the list of free blocks
is the prefix cache. A block is known by a key: a 128-bit hash of its tokens chained to the key of the one before
(as in vLLM), and so of everything from the beginning on. Plain data; knows neither tensors nor requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Key = bytes
"""What a block holds, and all that stands before it."""


def chained(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a block that holds `tokens` (all of it, or its beginning) after the block `parent`."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


def root(salt: str) -> Key:
    """The key before the first block. `salt` separates what must not be shared: weights, adapters, tenants."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Copy:
    """Before the step computes: copy all of block `source` to block `target`."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Wipe:
    """Before the step computes: fill a block with zeros, as what it holds may be nan, and 0 x nan is nan."""

    target: int


Chore = Copy | Wipe


class BlockPool:
    """`blocks` blocks of `block_tokens` tokens with reference counts, the cached ones reused oldest first."""

    def __init__(self, blocks: int, block_tokens: int, *, prefix_cache: bool = True) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self.shares = prefix_cache
        """Whether blocks are found by what they hold."""
        self._holders = [0] * blocks
        self._empty = list(range(blocks - 1, -1, -1))  # free and without a key; the last one is taken first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and with a key, least recently held first
        self._by_key: dict[Key, int] = {}
        self._keys: list[list[Key]] = [[] for _ in range(blocks)]
        self._tainted: set[int] = set()
        self._chores: list[Chore] = []

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        return self.blocks - self.free

    def holders(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._holders[block]

    def find(self, key: Key) -> int | None:
        """The block with that content, if there is one."""
        return self._by_key.get(key)

    def is_free(self, block: int) -> bool:
        return self._holders[block] == 0

    def hold(self, block: int) -> None:
        """One more holder of a block that was found."""
        if self._holders[block] == 0:
            del self._cached[block]
        self._holders[block] += 1

    def take(self) -> int:
        """A block for new content; the caller has made sure that one is free."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        if block in self._tainted:
            self._tainted.discard(block)
            self._chores.append(Wipe(block))
        return block

    def take_copy(self, source: int) -> int:
        """A block for new content that begins as a copy of `source`: what is shared is never written."""
        self.hold(source)  # so that it is not the one taken
        target = self.take()
        self.release([source])
        self._chores.append(Copy(source, target))
        return target

    def publish(self, block: int, key: Key) -> None:
        """Say what a held block holds, so that others find it; the first with a key keeps it."""
        if self.shares and key not in self._by_key:
            self._by_key[key] = block
            self._keys[block].append(key)

    def release(self, blocks: Sequence[int], *, tainted: bool = False) -> None:
        """One holder less of each block of a sequence, in order. `tainted`: they may hold nan."""
        for block in reversed(blocks):  # a sequence's end is reused before its beginning
            if tainted:
                self._tainted.add(block)
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._keys[block]:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def discredit(self, blocks: Sequence[int]) -> None:
        """Nobody shall find these held blocks again."""
        for block in blocks:
            self._forget(block)

    def clear_cache(self) -> None:
        """Forget what all blocks hold, after a change of weights."""
        for block in range(self.blocks):
            self._forget(block)
        self._empty += self._cached
        self._cached.clear()

    def chores(self) -> tuple[Chore, ...]:
        """What has to be done to the blocks before the next step, in this order; asked for once a step."""
        chores, self._chores = tuple(self._chores), []
        return chores

    def _forget(self, block: int) -> None:
        for key in self._keys[block]:
            del self._by_key[key]
        self._keys[block].clear()
