"""What one forward pass takes, as tensors: a rank's part of some rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of tokens as the model takes them; under context parallelism, this rank's tokens of each row."""

    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    documents: Tensor | None = None  # (B, T)
    positions: Tensor | None = None  # (B, T), where they are not 0..T-1
