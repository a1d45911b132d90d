"""A small corpus of generated files, the data sections that name it, and a progress that remembers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muster.config.schema import Data, Source
from muster.data.tokenizer import Tokenizer

WORDS = ["def", "return", "naïve", "日本語", "0x1F", "123456", "{}", "\n\n", "    ", "<|endoftext|>", "🙂"]

Section = Callable[..., Data]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def write() -> Write:
    """`write(folder, files, words)` fills a folder with texts `000.txt`, `001.txt`, ..."""

    def write(folder: Path, files: int = 40, words: int = 60) -> Path:
        draw = random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(files):
            text = f"file {i}\n" + " ".join(draw.choices(WORDS, k=words)) + "\n"
            (folder / f"{i:03}.txt").write_text(text, "utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def section() -> Section:
    """`section(*files, held_out=..., tokenizer=...)` is the data section of a run file."""

    def section(*files: str, held_out: float = 0.1, **rest: Any) -> Data:
        return Data(train=[Source(files=list(files))], held_out=held_out, **rest)

    return section


@pytest.fixture
def corpus(write: Write, tmp_path: Path) -> Path:
    return write(tmp_path / "corpus")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and parts of a few hundred bytes, so that a small corpus has many."""
    monkeypatch.setattr("muster.data.shards._LEAST_BYTES", 1500)
    monkeypatch.setattr("muster.data.textfile.PART_BYTES", 400)


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["def f(value):\n    return value * 123456  # naïve 日本語\n"] * 20, 300)


class Recorder:
    """A Progress that remembers what it was told: [total, done] bytes of each work."""

    def __init__(self) -> None:
        self.work: dict[str, list[int]] = {}
        self.on_advance: Callable[[], None] = lambda: None

    def start(self, total_bytes: int, what: str) -> None:
        self._what = what
        self.work[what] = [total_bytes, 0]

    def advance(self, size_bytes: int) -> None:
        self.work[self._what][1] += size_bytes
        self.on_advance()

    def done(self) -> None:
        pass


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
