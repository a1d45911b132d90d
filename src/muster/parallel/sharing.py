"""Who works on which matrix when matrices are spread over ranks, and what is sent for that; pure, knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Shape = tuple[int, int, int]
"""Matrices of a stack, rows, columns; a lone matrix is a stack of one."""


@dataclass(frozen=True, slots=True)
class Box:
    """One rank's part of a stack of matrices: the same rows and columns of some of them."""

    stack: range
    rows: range
    columns: range

    @property
    def elements(self) -> int:
        """Of one matrix."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True, slots=True)
class Move:
    """A part of one matrix on its way from one rank to another, or from a rank to itself."""

    source: int
    target: int
    tensor: int
    """Which stack, in the order they were given."""
    index: int
    """Which matrix of the stack."""
    box: Box
    """Of the rank that holds the part."""


@dataclass(frozen=True, slots=True)
class Sharing:
    owners: dict[tuple[int, int], int] = field(default_factory=dict)
    """The rank that works on a matrix, by stack and index in it."""
    gather: list[Move] = field(default_factory=list)
    """Each part of each matrix to the owner, from the holder nearest to it."""
    scatter: list[Move] = field(default_factory=list)
    """From the owner to every holder of a part."""


def plan(shapes: Sequence[Shape], boxes: Sequence[Sequence[Box]]) -> Sharing:
    """Share out matrices, given the shape of each stack and each rank's box of it, `boxes[rank][stack]`.

    A matrix that some ranks hold whole is worked on by one of them, any other by any rank; the largest
    are given out first, each to the rank that has least to do. Equal on every rank.
    """
    sharing = Sharing()
    load = [0] * len(boxes)
    cost = [rows * columns * min(rows, columns) for _, rows, columns in shapes]
    matrices = [(tensor, index) for tensor, shape in enumerate(shapes) for index in range(shape[0])]
    for tensor, index in sorted(matrices, key=lambda matrix: -cost[matrix[0]]):
        holders = {
            rank: of[tensor]
            for rank, of in enumerate(boxes)
            if index in of[tensor].stack and of[tensor].elements
        }
        _, rows, columns = shapes[tensor]
        whole = [rank for rank, box in holders.items() if box.elements == rows * columns]
        owner = min(whole or range(len(boxes)), key=load.__getitem__)
        load[owner] += cost[tensor]
        sharing.owners[tensor, index] = owner
        nearest: dict[tuple[range, range], int] = {}
        for rank in sorted(holders, key=lambda rank: abs(rank - owner)):
            nearest.setdefault((holders[rank].rows, holders[rank].columns), rank)
        sharing.gather.extend(Move(rank, owner, tensor, index, holders[rank]) for rank in nearest.values())
        sharing.scatter.extend(Move(owner, rank, tensor, index, box) for rank, box in holders.items())
    return sharing
