"""A pseudo-random permutation of range(n), computed element by element: no list, and any n."""

from __future__ import annotations

import hashlib

_ROUNDS = 6
_WORD = (1 << 64) - 1


class Permutation:
    """A keyed bijection of range(n): a Feistel network over the next even number of bits, with cycle walking.

    (Luby & Rackoff 1988 for the network; Black & Rogaway 2002 for the walking.)
    """

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        self._half_bits = (max(n - 1, 1).bit_length() + 1) // 2
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Image of `index`, which must lie in range(n)."""
        # Walk until the image falls back into the range; the network is at most four times as wide.
        while True:
            index = self._network(index)
            if index < self.n:
                return index

    def _network(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(word: int) -> int:
    """Finalizer of splitmix64 (Steele et al. 2014): each output bit depends on each input bit."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)
