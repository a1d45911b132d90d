"""Sharing matrices out: every matrix once, evenly, and nothing sent that need not be."""

from __future__ import annotations

from collections import Counter

import pytest

from muster.parallel.sharing import Box, plan


def rows(of: int, rank: int, ranks: int, columns: int = 8) -> Box:
    size = -(-of // ranks)
    return Box(range(1), range(min(rank * size, of), min((rank + 1) * size, of)), range(columns))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_row_shards_are_worked_on_evenly_and_arrive_whole(ranks: int) -> None:
    shapes = [(1, 10, 8)] * 12
    sharing = plan(shapes, [[rows(10, rank, ranks)] * 12 for rank in range(ranks)])
    assert set(Counter(sharing.owners.values()).values()) == {12 // ranks}
    for moves in (sharing.gather, sharing.scatter):
        parts = Counter()
        for move in moves:
            parts[move.tensor] += move.box.elements
        assert all(parts[tensor] == 80 for tensor in range(12))
    assert all(move.target == sharing.owners[move.tensor, 0] for move in sharing.gather)
    assert all(move.source == sharing.owners[move.tensor, 0] for move in sharing.scatter)


def test_large_matrices_are_given_out_first() -> None:
    shapes = [(1, 4, 4), (1, 4, 4), (1, 8, 8), (1, 4, 4)]
    boxes = [
        [Box(range(1), range(r * n // 2, (r + 1) * n // 2), range(n)) for _, n, _ in shapes] for r in (0, 1)
    ]
    owners = plan(shapes, boxes).owners
    assert {owners[tensor, 0] for tensor in (0, 1, 3)} == {1 - owners[2, 0]}


def test_copies_share_the_work_and_take_parts_from_their_own_copy() -> None:
    boxes = [[rows(8, rank % 2, 2)] * 4 for rank in range(4)]  # two copies of two shards
    sharing = plan([(1, 8, 8)] * 4, boxes)
    assert sorted(sharing.owners.values()) == [0, 1, 2, 3]
    assert all(move.source // 2 == move.target // 2 for move in sharing.gather)
    assert len(sharing.scatter) == 16


def test_whole_experts_stay_where_they_are() -> None:
    boxes = [[Box(range(2 * rank, 2 * rank + 2), range(3), range(5))] for rank in range(4)]
    sharing = plan([(8, 3, 5)], boxes)
    assert [sharing.owners[0, expert] for expert in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(move.source == move.target for move in sharing.gather + sharing.scatter)


def test_an_empty_shard_sends_and_gets_nothing_but_may_work() -> None:
    boxes = [[rows(2, rank, 4)] * 4 for rank in range(4)]  # two rows for four ranks
    sharing = plan([(1, 2, 8)] * 4, boxes)
    assert {move.source for move in sharing.gather} == {move.target for move in sharing.scatter} == {0, 1}
    assert sorted(sharing.owners.values()) == [0, 1, 2, 3]
