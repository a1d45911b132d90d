"""What one forward pass takes, as tensors: a rank's part of some rows of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muster.model.transformer import positions_in_document
from muster.parallel.context import Kind
from muster.parallel.sequence import split


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows of tokens as the model takes them; under context parallelism, this rank's T / ranks tokens of each row."""

    tokens: Tensor  # (B, T)
    targets: Tensor | None = None  # (B, T)
    documents: Tensor | None = None  # (B, T) of whole rows always, where any holds a border between two
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

    def own_tokens(self, *, rank: int, ranks: int, kind: Kind) -> Inputs:
        """What one rank of the context axis gets of these rows, (B, T / ranks) of each, and where its tokens stand.

        Its queries meet the keys of all tokens, so it keeps all of `documents`.
        """

        def part(x: Tensor) -> Tensor:
            return split(x, 1, rank=rank, ranks=ranks, kind=kind)

        # Rotary positions may begin anew in each document, because only distances within one count.
        documents = torch.zeros_like(self.tokens) if self.documents is None else self.documents
        return Inputs(
            part(self.tokens),
            None if self.targets is None else part(self.targets),
            self.documents,
            part(positions_in_document(documents)),
        )

    @classmethod
    def join(cls, pieces: Sequence[Inputs]) -> Inputs:
        """The rows of all pieces, which are alike but for whether they hold borders between documents."""
        return cls(
            torch.cat([piece.tokens for piece in pieces]),
            _joined([piece.targets for piece in pieces]),
            _joined_documents(pieces),
            _joined([piece.positions for piece in pieces]),
        )


def _joined_documents(pieces: Sequence[Inputs]) -> Tensor | None:
    """A piece without borders has one document a row."""
    like = next((piece.documents for piece in pieces if piece.documents is not None), None)
    if like is None:
        return None
    found = [
        like.new_zeros(len(p.tokens), like.shape[1]) if p.documents is None else p.documents for p in pieces
    ]
    return torch.cat([documents.int() for documents in found])


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
