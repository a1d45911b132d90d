"""From a step's plan to a batch's tensors."""

from __future__ import annotations

from array import array

import pytest

from muster.serve.engine.blocks import root
from muster.serve.engine.runner import make_batch
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence


def work(tokens: int, blocks: list[int], start: int, stop: int, *, draft: int = 0, adapter: int = 0) -> Work:
    """Of a sequence whose tokens are 100, 101, ..., and its guesses 900, 901, ..."""
    sequence = Sequence(
        id="",
        arrival=0,
        tokens=list(range(100, 100 + tokens)),
        prompt_tokens=1,
        root=root(""),
        adapter=adapter,
    )
    sequence.blocks = array("q", blocks)
    return Work(sequence, start, stop, tuple(range(900, 900 + draft)))


def test_a_batch_of_everything() -> None:
    """A single token, a chunk of a prompt, a prompt's end, and a token with guesses, over blocks of four tokens."""
    works = [
        work(6, [7, 2], 5, 6),
        work(9, [1, 0, 4], 1, 6),
        work(3, [9, 8], 0, 3, adapter=1),
        work(4, [3, 6], 3, 4, draft=2, adapter=2),
    ]
    batch = make_batch(works, 4)
    assert batch.tokens.tolist() == [105, 101, 102, 103, 104, 105, 100, 101, 102, 103, 900, 901]
    assert batch.positions.tolist() == [5, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == [9, 5, 6, 7, 0, 1, 36, 37, 38, 15, 24, 25]
    assert batch.starts.tolist() == [0, 1, 6, 9, 12]
    assert batch.lengths.tolist() == [6, 6, 3, 6]
    assert batch.table.tolist() == [[7, 2], [1, 0], [9, 8], [3, 6]]
    assert batch.wanted.tolist() == [0, 8, 9, 10, 11]
    assert batch.adapted.tolist() == [[1, 6, 9], [2, 9, 12]]


@pytest.mark.parametrize("length", [3, 8])
def test_short_sequences_have_padded_tables(length: int) -> None:
    batch = make_batch(
        [work(length, [5, 6][: -(-length // 4)], length - 1, length), work(12, [1, 2, 3], 11, 12)], 4
    )
    assert batch.table.tolist()[0] == [5, 6 if length > 4 else 0, 0]
    assert batch.table.is_contiguous()
    assert batch.decodes


def test_nothing_may_be_wanted() -> None:
    batch = make_batch([work(9, [1, 0, 4], 1, 6)], 4)
    assert batch.wanted.tolist() == []
    assert batch.adapted.shape == (0, 3)
