"""What one forward pass takes, as tensors: a rank's part of some rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of tokens as the model takes them; under context parallelism, this rank's tokens of each row."""

    tokens: Tensor  # (B, T)
    targets: Tensor | None = None  # (B, T)
    documents: Tensor | None = None  # (B, T), where any row holds a border between two
    positions: Tensor | None = None  # (B, T), where they are not 0..T-1

    def named(self) -> dict[str, Any]:
        """All but the tokens, by the names of the model's arguments."""
        named = {"targets": self.targets, "documents": self.documents, "positions": self.positions}
        return {name: value for name, value in named.items() if value is not None}

    def split(self, rows: int) -> list[Inputs]:
        """Pieces of at most `rows` rows."""
        return [
            Inputs(
                self.tokens[start : start + rows],
                *(
                    None if value is None else value[start : start + rows]
                    for value in (self.targets, self.documents, self.positions)
                ),
            )
            for start in range(0, len(self.tokens), rows)
        ]

    @classmethod
    def join(cls, pieces: Sequence[Inputs]) -> Inputs:
        """The rows of all pieces, which are alike but for whether they hold borders between documents."""
        documents = None
        if any(piece.documents is not None for piece in pieces):
            one = [torch.zeros_like(p.tokens) if p.documents is None else p.documents for p in pieces]
            documents = torch.cat([part.int() for part in one])
        return cls(
            torch.cat([piece.tokens for piece in pieces]),
            _joined([piece.targets for piece in pieces]),
            documents,
            _joined([piece.positions for piece in pieces]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
