"""Evaluation scores every held-out token exactly once and knows the bytes that they spell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muster.config.schema import Data, Source
from muster.data.dataset import Corpus, prepare
from muster.data.evaluation import EvaluationBatches
from muster.data.packing import IGNORED

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def held_out(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources with held-out documents."""
    base = tmp_path_factory.mktemp("evaluation")
    write(base / "a", files=20, words=10)
    write(base / "b", files=10, words=4)
    data = Data(train=[Source(files="a/*"), Source(files="b/*")], held_out=0.4)
    corpus = prepare(data, base, base / "cache")
    assert len(corpus.held_out) == 2
    return corpus


def batches_of(
    corpus: Corpus, sequence: int, rows: int, limit_tokens: int | None = None
) -> EvaluationBatches:
    return EvaluationBatches(corpus.held_out, corpus.tokenizer, sequence, rows, limit_tokens)


@given(sequence=st.integers(1, 700), rows=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_every_token_is_a_target_once_and_in_order(held_out: Corpus, sequence: int, rows: int) -> None:
    batches = batches_of(held_out, sequence, rows)
    scored: list[int] = []
    for index in range(len(batches)):
        batch = batches.batch(index)
        assert batch.tokens.shape == batch.targets.shape == batch.documents.shape == (rows, sequence)
        scored += batch.targets[batch.targets != IGNORED].tolist()
        inside = (batch.targets[:, :-1] != IGNORED) & (batch.targets[:, 1:] != IGNORED)
        assert np.array_equal(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])
    expected = [id for stream in held_out.held_out for id in stream.read(1, stream.tokens - 1).tolist()]
    assert scored == expected
    assert batches.bytes == held_out.held_out_bytes


def test_past_the_end_nothing_is_scored(held_out: Corpus) -> None:
    batches = batches_of(held_out, 16, 3)
    batch = batches.batch(len(batches) + 5)
    assert batch.tokens.shape == (3, 16)
    assert batch.valid_tokens == 0
    assert batches.batch(len(batches) - 1).valid_tokens > 0


@given(limit=st.integers(1, 3000), sequence=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_limit_is_shared_out_and_its_bytes_are_those_scored(
    held_out: Corpus, limit: int, sequence: int
) -> None:
    batches = batches_of(held_out, sequence, 2, limit)
    scored = sum(batches.batch(index).valid_tokens for index in range(len(batches)))
    available = held_out.held_out_tokens - 2
    assert min(limit, available) <= scored <= min(limit + 2, available)
    separators = sum(
        int((batches.batch(i).targets == held_out.tokenizer.bos_id).sum()) for i in range(len(batches))
    )
    # A token of this tokenizer is a byte; a limit may leave up to three bytes of a character in each source.
    assert scored - separators - 6 <= batches.bytes <= scored - separators


def test_documents_are_those_of_the_streams(held_out: Corpus) -> None:
    texts = [document.text for document in held_out.held_out_texts()]
    assert sum(len(text.encode()) for text in texts) == held_out.held_out_bytes
    ids = [id for stream in held_out.held_out for id in stream.read(0, stream.tokens).tolist()]
    assert held_out.tokenizer.decode(ids) == "".join(texts)


def test_nothing_held_out(held_out: Corpus) -> None:
    batches = EvaluationBatches([], held_out.tokenizer, 8, 2)
    assert len(batches) == 0
    assert batches.bytes == 0
