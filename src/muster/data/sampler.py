"""Sample i of a run is a pure function of the seed and i, so there is no state to save or to depend on ranks.

Sources are interleaved evenly by weight, so every stretch of samples, such as a global batch, holds
each source's exact share to within a few samples. A source's own samples are windows of its
stream in a fresh pseudo-random order each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from muster.data.packing import Batch, pack
from muster.data.permutation import Permutation
from muster.data.stream import TokenStream
from muster.data.tokenizer import Tokenizer
from muster.errors import DataError

__all__ = ["Batch", "Mixture", "Sample", "Sampler", "Windows"]


class Corpus(Protocol):
    """What the sampler needs of a `muster.data.dataset.Corpus`."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def train(self) -> Sequence[TokenStream]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a batch."""

    tokens: NDArray[np.int64]  # (T,)
    targets: NDArray[np.int64]  # (T,)
    documents: NDArray[np.int32]  # (T,)


class Sampler:
    """Samples of `sequence` tokens from a corpus's training streams; O(1) memory."""

    def __init__(self, corpus: Corpus, sequence: int, seed: int) -> None:
        self.sequence = sequence
        self._bos_id, self._eos_id = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id
        self._mixture = Mixture([stream.weight for stream in corpus.train])
        self._windows = [Windows(stream, sequence, (seed, s)) for s, stream in enumerate(corpus.train)]

    def sample(self, index: int) -> Sample:
        batch = self.batch([index])
        return Sample(batch.tokens[0], batch.targets[0], batch.documents[0])

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples of some indices, stacked: B rows of T tokens."""
        rows = np.empty((len(indices), self.sequence + 1), dtype=np.int64)  # (B, T + 1)
        for row, index in zip(rows, indices, strict=True):
            source, draw = self._mixture.locate(index)
            self._windows[source].read_into(row, draw)
        return pack(rows, self._bos_id, self._eos_id)


class Mixture:
    """Which source sample i comes from, and which of that source's samples it is.

    Of the first n samples, source 0 has floor(n p0), source 1 has floor(p1 x the rest), and so on, with
    each p the source's weight among those from it onwards. The counts sum to n and never fall as
    n grows (which largest-remainder quotas do not promise), and each stays within the number of sources of
    n times its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        shares = [weight / sum(exact[s:]) for s, weight in enumerate(exact)]
        self._shares = [(share.numerator, share.denominator) for share in shares]

    def locate(self, index: int) -> tuple[int, int]:
        """Source of sample `index`, and its number among that source's samples."""
        before, after = index, index + 1
        for source, (numerator, denominator) in enumerate(self._shares):
            count = before * numerator // denominator
            count_after = after * numerator // denominator
            if count_after > count:
                return source, count
            before, after = before - count, after - count
        raise AssertionError("the last source takes what is left")


class Windows:
    """The windows of one stream in the order they are drawn, epoch after epoch.

    The stream is taken as a ring. An epoch shifts a grid of windows that do not overlap by a random
    number of tokens and visits each window once, so that every token is as likely as any other
    to be the one left over, and documents are not cut at the same places in every epoch.
    """

    def __init__(self, stream: TokenStream, sequence: int, key: tuple[int, ...]) -> None:
        if stream.tokens < sequence + 1:
            raise DataError(
                f"source {stream.name} has {stream.tokens} training tokens, but one sample needs "
                f"{sequence + 1}: add text to it, or lower train.sequence"
            )
        self._stream, self._sequence, self._key = stream, sequence, key
        self.per_epoch = stream.tokens // sequence
        self._epoch = lru_cache(maxsize=4)(self._begin)

    def read_into(self, row: NDArray[Any], draw: int) -> None:
        """Copy the T + 1 tokens of a draw."""
        start, length = self.start(draw), len(row)
        head = min(length, self._stream.tokens - start)
        row[:head] = self._stream.read(start, head)
        if head < length:
            row[head:] = self._stream.read(0, length - head)

    def start(self, draw: int) -> int:
        """Position in the stream of the first token of a draw."""
        epoch, index = divmod(draw, self.per_epoch)
        offset, order = self._epoch(epoch)
        return (offset + order(index) * self._sequence) % self._stream.tokens

    def _begin(self, epoch: int) -> tuple[int, Permutation]:
        order = Permutation(self.per_epoch, *self._key, epoch)
        offset = Permutation(self._stream.tokens, *self._key, epoch, -1)(0)
        return offset, order
