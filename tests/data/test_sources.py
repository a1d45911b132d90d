"""Which files and documents a source means, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from muster.config.schema import Data, Source
from muster.data.dataset import prepare
from muster.data.sources import list_files
from muster.errors import DataError, MissingExtra

Section = Callable[..., Data]
Write = Callable[..., Path]


def texts(data: Data, base: Path) -> dict[str, str]:
    """The held-out documents by name."""
    corpus = prepare(data, base, base / "cache")
    held_out = {document.name: document.text for document in corpus.held_out_texts()}
    assert len(held_out) == sum(stream.documents for stream in corpus.held_out)
    return held_out


def test_globs_names_and_excludes(tmp_path: Path) -> None:
    for name in ("a.py", "x/b.py", "x/test/c.py", "x/d.min.js", "y/e.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text("x = 1\n")

    def names(files: str | list[str], *exclude: str) -> list[str]:
        return [file.name for file in list_files(Source(files=files, exclude=list(exclude)), tmp_path)]

    assert names("src/**/*.py") == ["a.py", "x/b.py", "x/test/c.py", "y/e.py"]
    assert names(str(tmp_path / "src/**/*.py")) == ["a.py", "x/b.py", "x/test/c.py", "y/e.py"]
    assert names("src/**/*", "**/test/**", "*.min.js", "src/y/*") == ["a.py", "x/b.py"]
    assert names(["src/a.py", "src/x/*.py"]) == ["a.py", "b.py"]
    assert names(["src/a.py", "src/*.py"]) == ["a.py"]


def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert [file.name for file in list_files(Source(files="~/*.txt"), Path("/"))] == ["a.txt"]


def test_standard_library_without_what_is_installed_into_it() -> None:
    files = list_files(Source(files="stdlib:**/*.py", exclude=["**/test/**"]), Path("/"))
    names = [file.name for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("corpus/*.md", r"no file matches corpus/\*\.md in .*: check the path"),
        ("corpus/nowhere.txt", "no file matches corpus/nowhere.txt in"),
        ("corpus", r"corpus is a folder: write corpus/\*\*/\*"),
        ("stdlib:nowhere/*.py", "no file of the standard library matches"),
    ],
)
def test_nothing_there(files: str, message: str, corpus: Path) -> None:
    with pytest.raises(DataError, match=message):
        list_files(Source(files=files), corpus.parent)


def test_everything_excluded(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"exclude leaves none of the 40 files of corpus/\*"):
        list_files(Source(files="corpus/*", exclude=["*.txt"]), corpus.parent)


def test_empty_files(tmp_path: Path, section: Section) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(" \n" * i)
    with pytest.raises(DataError, match=r"the 3 files of \*\.txt hold no text"):
        prepare(section("*.txt"), tmp_path, tmp_path / "cache")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    corpus = prepare(section("*.txt"), tmp_path, tmp_path / "cache")
    assert corpus.train[0].documents + corpus.held_out[0].documents == 2


def test_files_that_are_not_text_are_an_error_if_many(tmp_path: Path, section: Section, write: Write) -> None:
    write(tmp_path, files=8)
    (tmp_path / "bad.txt").write_bytes(b"abc\xe9t\xe9")
    (tmp_path / "image.txt").write_bytes(b"PNG\0\0")
    message = r"2 of the 10 files of \*\.txt are not UTF-8 text, first bad\.txt \(byte 0xe9 at offset 3\), "
    message += r"image\.txt \(NUL byte at offset 3\): exclude or re-encode them"
    with pytest.raises(DataError, match=message):
        prepare(section("*.txt"), tmp_path, tmp_path / "cache")


def test_files_that_are_not_text_are_left_out_if_few(tmp_path: Path, section: Section, write: Write) -> None:
    write(tmp_path, files=100, words=3)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    corpus = prepare(section("*.txt"), tmp_path, tmp_path / "cache")
    assert corpus.report.skipped == ("bad.txt (byte 0xff at offset 0)",)
    assert "left out 1 files" in str(corpus.report)
    assert corpus.train[0].documents + corpus.held_out[0].documents == 100


def test_bad_byte_far_into_a_long_file_has_its_offset(
    tmp_path: Path, small_shards: None, section: Section
) -> None:
    (tmp_path / "a.txt").write_bytes("é\n".encode() * 2000 + b"\xff")
    with pytest.raises(DataError, match="byte 0xff at offset 6000"):
        prepare(section("a.txt"), tmp_path, tmp_path / "cache")


def test_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: Section, write: Write
) -> None:
    write(tmp_path, files=3)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("muster.data.textfile._blocks", refuse)
    with pytest.raises(DataError, match=r"000\.txt cannot be read \(Permission denied\): exclude it"):
        prepare(section("*.txt"), tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("length", [0, 1, 5000])
def test_long_documents_come_back_whole(
    length: int, tmp_path: Path, small_shards: None, section: Section
) -> None:
    long = "def f():\n    return 'é日🙂'\n\n\n" * length + "é" * 3000
    (tmp_path / "a.txt").write_text(long, "utf-8")
    (tmp_path / "b.txt").write_text(long + "!", "utf-8")
    data = section("*.txt", held_out=1.0)
    [(name, text)] = texts(data, tmp_path).items()
    assert text == (long if name == "a.txt" else long + "!")
    corpus = prepare(data, tmp_path, tmp_path / "cache")
    [stream] = corpus.held_out
    ids = stream.read(0, stream.tokens).tolist()
    assert ids[0] == corpus.tokenizer.bos_id
    assert corpus.tokenizer.decode(ids) == text
    assert (stream.documents, stream.bytes) == (1, len(text.encode()))


RECORDS = [{"text": f"record {i} é\n", "other": i} for i in range(30)]


def test_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: Section) -> None:
    monkeypatch.setattr("muster.data.parts.PART_BYTES", 50)
    lines = [json.dumps(record) for record in RECORDS]
    lines[3:3] = ["", json.dumps({"text": "  "})]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines))
    found = texts(section("a.jsonl", held_out=1.0), tmp_path)
    assert len(found) == 29  # one stays for training
    assert found["a.jsonl#1"] == "record 0 é\n"
    assert found["a.jsonl#6"] == "record 3 é\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"a\.jsonl:2: not JSON \(.*\): every line must be one object"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: byte 0xff at offset 10 of the line is not UTF-8"),
        (b"[1]", r"a\.jsonl:2: a list instead of an object"),
        (b'{"body": "x"}', r"a\.jsonl:2: no field 'text' \(it has body\): write text: NAME"),
        (b'{"text": null}', r"a\.jsonl:2: field 'text' is a NoneType instead of text"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: character 0 of field 'text' is half a surrogate pair"),
        (b"[" * 100_000, r"a\.jsonl:2: not JSON"),
    ],
)
def test_broken_records(line: bytes, message: str, tmp_path: Path, section: Section) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        prepare(section("a.jsonl"), tmp_path, tmp_path / "cache")


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"text": [r["text"] for r in RECORDS] + [None, ""], "other": [0] * 32}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=7)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: Section) -> None:
    monkeypatch.setattr("muster.data.columnar._PART_BYTES", 150)
    write_parquet(tmp_path / "a.parquet")
    found = texts(section("a.parquet", held_out=1.0), tmp_path)
    assert len(found) == 29
    for name, text in found.items():
        assert text == f"record {int(name.removeprefix('a.parquet#')) - 1} é\n"


def test_broken_parquet(tmp_path: Path) -> None:
    def source(text: str) -> Data:
        return Data(train=[Source(files="a.parquet", text=text)])

    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'body' \(it has text, other\): write text: NAME"):
        prepare(source("body"), tmp_path, tmp_path / "cache")
    with pytest.raises(DataError, match="column 'other' holds int64 instead of strings"):
        prepare(source("other"), tmp_path, tmp_path / "cache")
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read as a columnar file"):
        prepare(source("text"), tmp_path, tmp_path / "cache")


def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: Section) -> None:
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'musterllm\[parquet\]'"):
        prepare(section("a.parquet"), tmp_path, tmp_path / "cache")
    with pytest.raises(MissingExtra, match=r"pip install 'musterllm\[hf\]'"):
        prepare(Data(train=[Source(hf="owner/name")]), tmp_path, tmp_path / "cache")


def test_hub_data_sets_are_read_from_their_arrow_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow

    path = tmp_path / "train.arrow"
    table = pyarrow.table({"text": [record["text"] for record in RECORDS]})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    asked: list[object] = []

    def load_dataset(*name: object, split: str) -> SimpleNamespace:
        asked.append((*name, split))
        return SimpleNamespace(cache_files=[{"filename": str(path)}])

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = texts(Data(train=[Source(hf="owner/name:en")], held_out=1.0), tmp_path)
    assert asked[0] == ("owner/name", "en", "train")
    assert len(found) == 29
    for name, text in found.items():
        assert text == f"record {int(name.removeprefix('owner/name:en/0#')) - 1} é\n"


def test_file_that_changes_while_it_is_read(corpus: Path, section: Section, recorder: Any) -> None:
    def append() -> None:
        with open(corpus / "039.txt", "ab") as file:
            file.write(b"more")

    recorder.on_advance = append
    with pytest.raises(DataError, match=r"039\.txt was changed while it was being read: run again"):
        prepare(section("corpus/*"), corpus.parent, corpus.parent / "cache", progress=recorder)


def test_progress_adds_up(corpus: Path, section: Section, recorder: Any) -> None:
    tokenizer = {"train": "bpe", "vocab": 300}
    prepare(section("corpus/*", tokenizer=tokenizer), corpus.parent, corpus.parent / "c", progress=recorder)
    assert list(recorder.work) == ["reading", "training the tokenizer", "tokenising"]
    for total, done in recorder.work.values():
        assert total == done > 0


def test_nothing_is_printed(corpus: Path, capfd: pytest.CaptureFixture[str], section: Section) -> None:
    prepare(section("corpus/*", tokenizer={"train": "bpe", "vocab": 300}), corpus.parent, corpus.parent / "c")
    assert capfd.readouterr() == ("", "")
