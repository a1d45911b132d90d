"""What the model sees of a stretch of stream: tokens, what to predict at each, and each one's document."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Target of a position that is not scored."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents, as the model takes them."""

    tokens: NDArray[np.int64]  # (B, T)
    targets: NDArray[np.int64]  # (B, T), IGNORED where nothing is to be predicted
    documents: NDArray[np.int32]  # (B, T), rising by one where a document begins

    @cached_property
    def valid_tokens(self) -> int:
        """Number of targets that are scored."""
        return int((self.targets != IGNORED).sum())


def pack(windows: NDArray[Any], bos_id: int, eos_id: int) -> Batch:
    """Cut windows of T + 1 tokens, shape (B, T + 1), into inputs and targets.

    A bos of its own follows an eos without being the model's to predict; where one token is both, it is
    the end of the document before it and is predicted.
    """
    tokens = windows[:, :-1].astype(np.int64)  # (B, T)
    targets = windows[:, 1:].astype(np.int64)  # (B, T)
    if bos_id != eos_id:
        targets[targets == bos_id] = IGNORED
    documents = np.cumsum(tokens == bos_id, axis=1, dtype=np.int32)  # (B, T)
    return Batch(tokens, targets, documents)
