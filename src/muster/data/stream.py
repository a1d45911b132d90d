"""A source's tokens as one long row of numbers, though they lie in many memory-mapped files."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Each map holds a file descriptor, of which a process may commonly have 1024.
_MAPS = 128


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) of a file of raw little-endian token ids."""

    path: Path
    start: int
    stop: int


class TokenStream:
    """Tokens of the documents of one source, one document behind the other, read by position.

    Cheap to open: a file is mapped when it is first read. A document is `bos, t1 .. tn, eos`, or
    `bos, t1 .. tn` where bos and eos are one token.
    """

    def __init__(
        self,
        name: str,
        segments: Sequence[Segment],
        dtype: np.dtype[Any],
        *,
        documents: int,
        size_bytes: int,
        weight: float = 1.0,
    ) -> None:
        self.name, self.weight = name, weight
        self.documents, self.bytes = documents, size_bytes
        self._dtype = dtype
        self._segments = [segment for segment in segments if segment.stop > segment.start]
        self._ends = list(accumulate(segment.stop - segment.start for segment in self._segments))
        self.tokens = self._ends[-1] if self._ends else 0
        self._mapped = lru_cache(maxsize=_MAPS)(self._map)

    def read(self, start: int, count: int) -> NDArray[np.unsignedinteger]:
        """Tokens [start, start + count), which must exist."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.tokens}")
        pieces: list[NDArray[Any]] = []
        index = bisect.bisect_right(self._ends, start)
        while count > 0:
            tokens = self._mapped(index)
            offset = start - (self._ends[index] - len(tokens))
            piece = tokens[offset : offset + count]
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self._dtype)

    def _map(self, index: int) -> NDArray[Any]:
        segment, dtype = self._segments[index], self._dtype
        mapped = np.memmap(
            segment.path,
            dtype=dtype,
            mode="r",
            offset=segment.start * dtype.itemsize,
            shape=(segment.stop - segment.start,),
        )
        return np.asarray(mapped)  # slices of a plain array cost a tenth of a memmap's
