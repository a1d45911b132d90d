"""Which query rows and keys make up a block of attention (`blocked.py`), as plain numbers; knows no torch."""

from __future__ import annotations

MAX_TOKENS = 2048
"""Longest sequence worth the memory of blocks, which keep their probabilities: see `attend.py`."""
BLOCK_ROWS, SHORT_BLOCK_ROWS = 128, 64
_SHORT_TOKENS = 256
"""Up to here smaller blocks pay, which compute fewer of the masked scores: 8 % at 256 tokens."""


def rows(length: int) -> int:
    """Query rows of a block, for sequences of `length` tokens."""
    return SHORT_BLOCK_ROWS if length <= _SHORT_TOKENS else BLOCK_ROWS


def block(start: int, length: int, window: int | None) -> tuple[slice, slice]:
    """The query rows of the block that starts with row `start`, and the keys that any of them may see."""
    stop = min(start + rows(length), length)
    first = 0 if window is None else max(start - window + 1, 0)
    return slice(start, stop), slice(first, stop)


def kept_scores(length: int, window: int | None) -> int:
    """Probabilities that are kept for one head and sequence: little more than the visible ones, T^2/2."""
    pairs = (block(start, length, window) for start in range(0, length, rows(length)))
    return sum((queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in pairs)
