"""The token store: built once, whatever happens on the way, and never out of date."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muster.config.schema import Data
from muster.data.dataset import Corpus, prepare
from muster.data.tokenizer import Tokenizer
from muster.errors import DataError

Section = Callable[..., Data]
Write = Callable[..., Path]

BPE = {"train": "bpe", "vocab": 300}

# Builds a store, and kills itself without warning at the given one of the moments when something happens.
BUILDER = """
import os, signal, sys
from pathlib import Path
from muster.config.schema import Data, Source, TrainTokenizer
from muster.data import dataset, shards, textfile
shards._LEAST_BYTES, textfile.PART_BYTES = 1500, 400
base, cache, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
moments = 0

def happens(*_):
    global moments
    moments += 1
    if moments == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def watched(function):
    def call(*arguments):
        happens()
        result = function(*arguments)
        happens()
        return result
    return call

os.replace, os.fsync = watched(os.replace), watched(os.fsync)
class Progress:
    start = advance = done = happens
tokenizer = TrainTokenizer(train="bpe", vocab=300)
section = Data(train=[Source(files="corpus/*")], held_out=0.1, tokenizer=tokenizer)
corpus = dataset.prepare(section, base, cache, progress=Progress())
print(corpus.report.built.shards, corpus.report.built.reused, moments)
"""


def start_builder(base: Path, cache: Path, moment: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(base), str(cache), str(moment)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(builder: subprocess.Popen[str]) -> list[int]:
    """Shards built and reused, and the number of moments; [] if it was killed."""
    answer, _ = builder.communicate(timeout=100)
    assert builder.returncode in (0, -signal.SIGKILL)
    return [int(figure) for figure in answer.split()]


def content(cache: Path) -> dict[str, bytes]:
    """Every file of a cache but the lock, and the catalogues, which come only when the files have settled."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.name != "lock")
    kept = (path for path in files if not path.match("catalogues/*.json"))
    return {str(path.relative_to(cache)): path.read_bytes() for path in kept}


@pytest.mark.usefixtures("small_shards")
def test_killed_builds_end_like_an_undisturbed_one(corpus: Path, section: Section, tmp_path: Path) -> None:
    shards, reused, moments = finish(start_builder(tmp_path, tmp_path / "undisturbed"))
    assert shards > 3
    assert reused == 0
    # The first third of the moments belongs to reading, which leaves nothing behind.
    for moment in random.Random(moments).sample(range(moments // 3, moments), 4):
        cache = tmp_path / f"killed-{moment}"
        assert finish(start_builder(tmp_path, cache, moment)) == []
        built = prepare(section("corpus/*", tokenizer=BPE), tmp_path, cache).report.built
        assert built.shards + built.reused == shards
        assert content(cache) == content(tmp_path / "undisturbed")


def test_two_processes_share_the_work(corpus: Path, tmp_path: Path) -> None:
    builders = [start_builder(tmp_path, tmp_path / "cache") for _ in range(2)]
    answers = sorted(finish(builder)[:2] for builder in builders)
    shards = answers[1][0]
    assert answers == [[0, shards], [shards, 0]]


def prepared(data: Data, base: Path) -> Corpus:
    return prepare(data, base, base / "cache")


def train_ids(corpus: Corpus) -> list[int]:
    [stream] = corpus.train
    return [int(id) for id in stream.read(0, stream.tokens)]


@pytest.mark.usefixtures("small_shards")
def test_documents_are_framed_and_in_order(corpus: Path, section: Section) -> None:
    found = prepared(section("corpus/*"), corpus.parent)
    [train], [held_out] = found.train, found.held_out
    expected: dict[bool, list[int]] = {True: [], False: []}
    names = {document.name for document in found.held_out_texts()}
    for path in sorted(corpus.iterdir()):
        ids = [found.tokenizer.bos_id, *found.tokenizer.encode(path.read_text())]
        expected[path.name in names] += ids
    assert train_ids(found) == expected[False]
    assert held_out.read(0, held_out.tokens).tolist() == expected[True]
    assert (train.documents, held_out.documents) == (40 - len(names), len(names))
    assert found.held_out_bytes == sum((corpus / name).stat().st_size for name in names)
    assert found.train_tokens == len(expected[False])


@pytest.mark.usefixtures("small_shards")
def test_two_separators(corpus: Path, section: Section, bpe: Tokenizer) -> None:
    bpe.save(corpus.parent / "t")
    config = corpus.parent / "t" / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "d"}))
    found = prepared(section("corpus/*", held_out=0, tokenizer="t"), corpus.parent)
    tokenizer, ids = found.tokenizer, train_ids(found)
    assert tokenizer.bos_id != tokenizer.eos_id
    assert ids.count(tokenizer.bos_id) == 40
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert all(ids[i - 1] == tokenizer.eos_id for i, id in enumerate(ids) if id == tokenizer.bos_id and i)


@pytest.mark.usefixtures("small_shards")
def test_second_call_reuses_everything(corpus: Path, section: Section) -> None:
    data = section("corpus/*", tokenizer=BPE)
    first, second = prepared(data, corpus.parent), prepared(data, corpus.parent)
    assert first.report.built.shards > 3
    assert (second.report.built.shards, second.report.built.reused) == (0, first.report.built.shards)
    assert (first.report.tokenizer, second.report.tokenizer) == ("trained", "reused")
    assert train_ids(first) == train_ids(second)
    assert str(first.report).startswith("tokenizer trained; tokenised 0.0 MB in ")
    assert str(second.report) == f"tokenizer reused; all {second.report.built.reused} shards reused"


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["grow", "add", "remove", "rename"])
def test_change_of_one_file_rebuilds_only_what_is_near(change: str, corpus: Path, section: Section) -> None:
    data = section("corpus/*", held_out=0)
    shards = prepared(data, corpus.parent).report.built.shards
    match change:
        case "grow":
            with open(corpus / "010.txt", "a") as file:
                file.write("more " * 30)
        case "add":
            (corpus / "010x.txt").write_text("new " * 50)
        case "remove":
            (corpus / "010.txt").unlink()
        case "rename":
            (corpus / "010.txt").rename(corpus / "010-renamed.txt")
    built = prepared(data, corpus.parent).report.built
    assert built.shards < shards / 2
    assert built.reused > shards / 2


def test_change_of_equal_size_and_time_is_noticed(
    corpus: Path, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muster.data.catalogue._SETTLED_NS", -(10**12))
    data, path = section("corpus/*", held_out=0), corpus / "007.txt"
    before = prepared(data, corpus.parent)
    assert list((corpus.parent / "cache" / "catalogues").iterdir())
    status, text = path.stat(), path.read_text()
    path.write_text(text.replace("file 7", "FILE 7"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = prepared(data, corpus.parent)
    assert after.report.built.shards == 1
    assert "FILE 7" in after.tokenizer.decode(train_ids(after))
    assert len(train_ids(before)) == len(train_ids(after))


def test_catalogue_is_remembered_only_when_the_files_have_settled(
    corpus: Path, section: Section, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = section("corpus/*"), corpus.parent / "cache"
    for settled_ns, readings in ((10**18, 2), (-(10**12), 1)):
        monkeypatch.setattr("muster.data.catalogue._SETTLED_NS", settled_ns)
        read = 0
        for _ in range(2):
            recorder.work.clear()
            prepare(data, corpus.parent, cache, progress=recorder)
            read += "reading" in recorder.work
        assert read == readings


@pytest.mark.usefixtures("small_shards")
def test_truncated_missing_and_corrupt_shards_are_made_again(corpus: Path, section: Section) -> None:
    data, cache = section("corpus/*"), corpus.parent / "cache"
    sound = train_ids(prepared(data, corpus.parent))
    shards = sorted((cache / "shards").iterdir())
    os.truncate(shards[0], shards[0].stat().st_size - 2)
    shards[1].unlink()
    again = prepared(data, corpus.parent)
    assert again.report.built.shards == 2
    assert train_ids(again) == sound
    flipped = bytearray(shards[2].read_bytes())
    flipped[10] ^= 4
    shards[2].write_bytes(flipped)
    for index in (cache / "indexes").iterdir():
        index.write_text("[{}]")
    again = prepared(data, corpus.parent)
    assert again.report.built.shards == 1
    assert train_ids(again) == sound


def test_no_space_left(corpus: Path, section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("muster.data.files.os.fsync", full)
        with pytest.raises(DataError, match=r"no space left for .* \([0-9.]+ MB free\): make room there"):
            prepared(section("corpus/*"), corpus.parent)
    assert content(corpus.parent / "cache") == {}
    assert prepared(section("corpus/*"), corpus.parent).train_tokens


def test_leftovers_of_killed_writers_are_removed(corpus: Path, section: Section) -> None:
    draft = corpus.parent / "cache" / "shards" / "x.tokens.1.partial"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"half")
    prepared(section("corpus/*"), corpus.parent)
    assert not draft.exists()


def test_large_vocabularies_take_four_bytes(
    corpus: Path, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Tokenizer.byte()
    wide.dtype = np.dtype("<u4")
    monkeypatch.setattr(Tokenizer, "byte", lambda: wide)
    found = prepared(section("corpus/*"), corpus.parent)
    assert found.train[0].read(0, 3).dtype == np.uint32
    assert found.tokenizer.decode(train_ids(found)).startswith("file 0")


def test_cache_that_cannot_be_made(corpus: Path, section: Section) -> None:
    (corpus.parent / "file").touch()
    with pytest.raises(DataError, match=r"cache folder .*file/cache cannot be made \(Not a directory\)"):
        prepare(section("corpus/*"), corpus.parent, corpus.parent / "file" / "cache")


def test_pieces_of_a_long_document_have_the_tokens_of_the_whole(
    tmp_path: Path, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muster.data.textfile.PART_BYTES", 3000)
    monkeypatch.setattr("muster.data.parts.cuts.__defaults__", (700,))
    text = Path(json.__file__).with_name("encoder.py").read_text("utf-8")
    (tmp_path / "long.py").write_text(text, "utf-8")
    corpus = prepared(section("long.py", held_out=0, tokenizer=BPE), tmp_path)
    assert train_ids(corpus)[1:] == corpus.tokenizer.encode(text)
