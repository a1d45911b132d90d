"""The held-out split depends on names alone, and neither side is ever empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from muster.config.schema import Data, Source
from muster.data.dataset import Corpus, prepare
from muster.errors import DataError

Section = Callable[..., Data]
Write = Callable[..., Path]


def held_out_names(corpus: Corpus) -> set[str]:
    return {document.name for document in corpus.held_out_texts()}


def test_split_depends_on_neither_place_nor_content_nor_neighbours(
    write: Write, section: Section, tmp_path: Path
) -> None:
    write(tmp_path / "a" / "corpus", files=60)
    write(tmp_path / "b" / "data" / "deep", words=3)
    first = held_out_names(prepare(section("corpus/*"), tmp_path / "a", tmp_path / "cache"))
    second = held_out_names(prepare(section("data/deep/*"), tmp_path / "b", tmp_path / "cache"))
    assert second
    assert second == {name for name in first if int(name[:3]) < 40}


def test_share_is_about_what_was_asked(write: Write, section: Section, tmp_path: Path) -> None:
    write(tmp_path, files=400, words=1)
    small, large = (
        held_out_names(prepare(section("*.txt", held_out=share), tmp_path, tmp_path / "cache"))
        for share in (0.1, 0.2)
    )
    assert 20 < len(small) < 60 < len(large) < 110
    assert small < large


@pytest.mark.parametrize("held_out", [1e-9, 0.999999, 1.0])
def test_both_sides_exist(held_out: float, write: Write, section: Section, tmp_path: Path) -> None:
    write(tmp_path, files=3)
    corpus = prepare(section("*.txt", held_out=held_out), tmp_path, tmp_path / "cache")
    documents = corpus.train[0].documents, corpus.held_out[0].documents
    assert documents == ((2, 1) if held_out < 0.5 else (1, 2))


def test_one_document_cannot_be_split(write: Write, section: Section, tmp_path: Path) -> None:
    write(tmp_path, files=1)
    with pytest.raises(DataError, match="the sources have only 1 in all: write held_out: 0, or divide"):
        prepare(section("*.txt"), tmp_path, tmp_path / "cache")
    corpus = prepare(section("*.txt", held_out=0), tmp_path, tmp_path / "cache")
    assert corpus.held_out == []
    assert (corpus.train[0].documents, corpus.held_out_tokens, corpus.held_out_bytes) == (1, 0, 0)


def test_every_source_keeps_training_documents(write: Write, tmp_path: Path) -> None:
    write(tmp_path / "one", files=1)
    write(tmp_path / "many", files=10)
    data = Data(train=[Source(files="one/*", weight=2.0), Source(files="many/*")], held_out=0.9)
    corpus = prepare(data, tmp_path, tmp_path / "cache")
    assert [stream.weight for stream in corpus.train] == [2.0, 1.0]
    assert [stream.name for stream in corpus.train] == ["one/*", "many/*"]
    assert all(stream.documents for stream in corpus.train)
    assert [stream.name for stream in corpus.held_out] == ["many/*"]


def test_tokenizer_never_sees_held_out_text(write: Write, section: Section, tmp_path: Path) -> None:
    write(tmp_path, files=30)
    data = section("*.txt", held_out=0.3, tokenizer={"train": "bpe", "vocab": 300})
    before = prepare(data, tmp_path, tmp_path / "cache")
    for name in held_out_names(before):
        (tmp_path / name).write_text("zqzqzq " * 1000)
    after = prepare(data, tmp_path, tmp_path / "cache")
    assert after.tokenizer.digest == before.tokenizer.digest
    assert after.report.tokenizer == "reused"


def test_tokenizer_choices(write: Write, section: Section, tmp_path: Path) -> None:
    write(tmp_path, files=4, words=5)
    trained = prepare(
        section("*.txt", tokenizer={"train": "bpe", "vocab": 5000}),
        tmp_path,
        tmp_path / "c",
        tokenizer_folder=tmp_path / "t",
    )
    assert f"the text yields only {trained.tokenizer.vocab} of 5000 tokens" in trained.report.tokenizer
    for path in ("t", "t/tokenizer.json", str(tmp_path / "t")):
        corpus = prepare(section("*.txt", tokenizer=path), tmp_path, tmp_path / "c")
        assert corpus.tokenizer.digest == trained.tokenizer.digest
    assert prepare(section("*.txt"), tmp_path, tmp_path / "c").tokenizer.vocab == 257
