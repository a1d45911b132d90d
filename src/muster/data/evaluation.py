"""The held-out documents as batches in which each token is the target exactly once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from muster.data.packing import IGNORED, Batch, pack
from muster.data.stream import TokenStream
from muster.data.tokenizer import Tokenizer


class EvaluationBatches:
    """Batches of `rows` consecutive windows, padded where the text ends; any rank may take any of them.

    With `limit_tokens`, only about that many tokens are scored, the first ones of each stream.
    The separator between two documents is scored too, so that the code length says where a document ends,
    but counts no bytes: what is left out is never in the model's favour.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        tokenizer: Tokenizer,
        sequence: int,
        rows: int,
        limit_tokens: int | None = None,
    ) -> None:
        self._streams, self._tokenizer, self._sequence, self._rows = list(streams), tokenizer, sequence, rows
        available = [max(stream.tokens - 1, 0) for stream in streams]  # nothing precedes a first token
        wanted = min(sum(available), sum(available) if limit_tokens is None else limit_tokens)
        # A limit is shared out by size, so that all sources have their part in it.
        self._targets = [-(-targets * wanted // max(sum(available), 1)) for targets in available]
        self._ends = list(accumulate(-(-targets // sequence) for targets in self._targets))
        self.bytes = sum(
            stream.bytes if targets == stream.tokens - 1 else self._spelled_bytes(stream, targets)
            for stream, targets in zip(streams, self._targets, strict=True)
        )
        """Bytes of the text that the scored tokens spell."""

    def __len__(self) -> int:
        windows = self._ends[-1] if self._ends else 0
        return -(-windows // self._rows)

    def batch(self, index: int) -> Batch:
        """Batch `index`; past the end one of the same shape in which nothing is scored."""
        filler = self._tokenizer.bos_id
        rows = np.full((self._rows, self._sequence + 1), filler, dtype=np.int64)  # (B, T + 1)
        scored = np.zeros(self._rows, dtype=np.int64)  # (B,) targets of each row
        for row in range(self._rows):
            window = index * self._rows + row
            source = bisect_right(self._ends, window)
            if source == len(self._ends):
                break
            start = (window - (self._ends[source - 1] if source else 0)) * self._sequence
            count = min(self._sequence, self._targets[source] - start)
            rows[row, : count + 1] = self._streams[source].read(start, count + 1)
            scored[row] = count
        batch = pack(rows, self._tokenizer.bos_id, self._tokenizer.eos_id)
        batch.targets[np.arange(self._sequence) >= scored[:, None]] = IGNORED  # (B, T)
        return batch

    def _spelled_bytes(self, stream: TokenStream, targets: int) -> int:
        text = self._tokenizer.decode(stream.read(0, targets + 1).tolist())
        # The limit may fall inside a character, whose first bytes spell nothing yet.
        return len(text.rstrip("\ufffd").encode())
