"""The sampler: a pure function of seed and index that visits every window once an epoch, in exact shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muster.data.packing import IGNORED, pack
from muster.data.permutation import Permutation
from muster.data.sampler import Mixture, Sampler, Windows
from muster.data.stream import Segment, TokenStream
from muster.data.tokenizer import Tokenizer
from muster.errors import DataError


def stream_of(folder: Path, tokens: Sequence[int], *, weight: float = 1.0, name: str = "s") -> TokenStream:
    """A stream in two files."""
    folder.mkdir(exist_ok=True)
    half = len(tokens) // 2
    segments = []
    for i, part in enumerate((tokens[:half], tokens[half:])):
        path = folder / f"{name}-{i}"
        np.array([9, *part, 9], dtype="<u2").tofile(path)
        segments.append(Segment(path, 1, 1 + len(part)))
    return TokenStream(name, segments, np.dtype("<u2"), documents=1, size_bytes=0, weight=weight)


@dataclass
class Corpus:
    tokenizer: Tokenizer
    train: list[TokenStream]


@given(n=st.integers(1, 2000), key=st.integers(0, 1 << 70))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    assert sorted(map(permutation, range(n))) == list(range(n))


def test_permutation_mixes_and_depends_on_its_key() -> None:
    first, second = ([Permutation(1000, 7, key)(i) for i in range(1000)] for key in (0, 1))
    assert first != second
    assert abs(np.corrcoef(range(1000), first)[0, 1]) < 0.1
    assert 0 <= Permutation(10**12, 1)(5) < 10**12


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    start=st.integers(0, 10**12),
    length=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_mixture_counts_are_exact_and_without_gaps(weights: list[float], start: int, length: int) -> None:
    mixture = Mixture(weights)
    drawn: dict[int, list[int]] = {}
    for index in range(start, start + length):
        source, number = mixture.locate(index)
        drawn.setdefault(source, []).append(number)
    for source, numbers in drawn.items():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        share = weights[source] / sum(weights)
        for count, total in ((numbers[-1] + 1, start + length), (len(numbers), length)):
            assert abs(count - total * share) <= 2 * len(weights) + 1e-9 * total


@given(
    tokens=st.integers(9, 400), sequence=st.integers(1, 8), seed=st.integers(0, 5), epoch=st.integers(0, 4)
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_disjoint_windows_once(tokens: int, sequence: int, seed: int, epoch: int) -> None:
    stream = TokenStream(
        "s", [Segment(Path("unread"), 0, tokens)], np.dtype("<u2"), documents=1, size_bytes=0
    )
    windows = Windows(stream, sequence, (seed, 0))
    draws = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
    inputs = Counter((windows.start(draw) + t) % tokens for draw in draws for t in range(sequence))
    assert set(inputs.values()) == {1}
    assert len(inputs) > tokens - sequence


def test_samples_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    train = [
        stream_of(tmp_path, draw.integers(0, 257, 101).tolist(), weight=w, name=f"{w}") for w in (1.0, 3.0)
    ]
    corpus = Corpus(Tokenizer.byte(), train)
    sampler = Sampler(corpus, 8, seed=3)
    whole = sampler.batch(range(100, 164))
    for size in (1, 5, 32):
        parts = [Sampler(corpus, 8, 3).batch(range(i, min(i + size, 164))) for i in range(100, 164, size)]
        for name in ("tokens", "targets", "documents"):
            assert np.array_equal(
                np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)
            )
    sample = sampler.sample(163)
    assert np.array_equal(sample.tokens, whole.tokens[-1])
    dtypes = [array.dtype.name for array in (whole.tokens, whole.targets, whole.documents)]
    assert dtypes == ["int64", "int64", "int32"]
    assert whole.tokens.shape == whole.targets.shape == whole.documents.shape == (64, 8)
    assert whole.valid_tokens == 64 * 8
    assert not np.array_equal(Sampler(corpus, 8, 4).batch(range(100, 164)).tokens, whole.tokens)


def test_windows_hold_the_stream_as_a_ring(tmp_path: Path) -> None:
    tokens = list(range(50))
    sampler = Sampler(Corpus(Tokenizer.byte(), [stream_of(tmp_path, tokens)]), 7, seed=0)
    batch = sampler.batch(range(7 * 40))
    assert np.array_equal((batch.tokens + 1) % 50, batch.targets)
    assert set(batch.tokens.ravel()) == set(tokens)


def test_too_short_a_source_is_refused(tmp_path: Path) -> None:
    corpus = Corpus(Tokenizer.byte(), [stream_of(tmp_path, range(8), name="tiny.txt")])
    assert Sampler(corpus, 7, 0).batch([0]).tokens.shape == (1, 7)
    with pytest.raises(
        DataError, match=r"source tiny.txt has 8 training tokens, but one sample needs 9: add text"
    ):
        Sampler(corpus, 8, 0)


def test_pack_with_one_separator_scores_it() -> None:
    batch = pack(np.array([[5, 0, 6, 7, 0]]), bos_id=0, eos_id=0)
    assert batch.targets.tolist() == [[0, 6, 7, 0]]
    assert batch.documents.tolist() == [[0, 1, 1, 1]]


def test_pack_with_two_separators_does_not_score_bos() -> None:
    batch = pack(np.array([[5, 1, 0, 6, 1, 0]]), bos_id=0, eos_id=1)
    assert batch.targets.tolist() == [[1, IGNORED, 6, 1, IGNORED]]
    assert batch.documents.tolist() == [[0, 0, 1, 1, 1]]
    assert batch.valid_tokens == 3


@given(st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_stream_reads_across_files(tmp_path_factory: pytest.TempPathFactory, start: int, count: int) -> None:
    stream = stream_of(tmp_path_factory.mktemp("stream"), range(60))
    if start + count <= 60:
        assert stream.read(start, count).tolist() == list(range(start, start + count))
    else:
        with pytest.raises(IndexError, match="of a stream of 60"):
            stream.read(start, count)
