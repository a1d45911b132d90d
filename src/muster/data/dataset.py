"""From the data section of a run file to token streams: take stock, split, find the tokenizer, tokenise.

Every rank calls `prepare`; whatever one of them, or an earlier run, has done is found and reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from muster.config import schema
from muster.data import catalogue, vocabulary
from muster.data.cache import Cache
from muster.data.progress import Progress, Silent
from muster.data.split import Split, split
from muster.data.store import Built, Store
from muster.data.stream import TokenStream
from muster.data.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Document:
    """A document and its name, which is the same on every machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """What preparing a corpus took."""

    built: Built
    tokenizer: str
    """How the tokenizer came about: bytes, from a file, trained, or reused."""
    skipped: tuple[str, ...]
    """Files left out because they are not UTF-8 text, with the reason."""

    def __str__(self) -> str:
        left_out = f"; left out {len(self.skipped)} files that are not text" if self.skipped else ""
        return f"tokenizer {self.tokenizer}; {self.built}{left_out}"


@dataclass(frozen=True, slots=True)
class Corpus:
    """The tokens of a run."""

    tokenizer: Tokenizer
    train: Sequence[TokenStream]
    """One stream a source, with its weight."""
    held_out: Sequence[TokenStream]
    """One stream for each source that has held-out documents."""
    report: Report
    _splits: Sequence[Split]

    @property
    def train_tokens(self) -> int:
        return sum(stream.tokens for stream in self.train)

    @property
    def held_out_tokens(self) -> int:
        return sum(stream.tokens for stream in self.held_out)

    @property
    def held_out_bytes(self) -> int:
        """Bytes of the held-out documents' text."""
        return sum(stream.bytes for stream in self.held_out)

    def held_out_texts(self) -> Iterator[Document]:
        """The held-out documents themselves, read from their files, in the order of the streams."""
        for part_of in self._splits:
            for entry in part_of.catalogue.entries:
                if entry.scan.lowest >= part_of.threshold:
                    continue
                pieces: list[str] = []
                for part in entry.scan.parts:
                    for text in part_of.held_out_texts(entry, part):
                        pieces.append(text.text)
                        if text.ends:
                            yield Document(text.document, "".join(pieces))
                            pieces.clear()


def prepare(
    section: schema.Data,
    base: Path,
    cache: Path,
    *,
    progress: Progress | None = None,
    tokenizer_folder: Path | None = None,
) -> Corpus:
    """Everything a run reads, tokenised; does only what no earlier call with the same `cache` has done.

    `base` is the run file's folder, from which its paths start. The tokenizer (bytes, where the section names
    none) is also written to `tokenizer_folder`. Safe to call from many processes at once, and to kill.
    Raises DataError and MissingExtra.
    """
    shelf, progress = Cache(cache), progress or Silent()
    catalogues = [catalogue.take(source, base, shelf, progress) for source in section.train]
    splits = split(catalogues, section.held_out)
    tokenizer, origin = vocabulary.resolve(section.tokenizer or "byte", base, splits, shelf, progress)
    if tokenizer_folder is not None:
        tokenizer.save(tokenizer_folder)
    stores = [Store(part, tokenizer, shelf) for part in splits]
    built = sum((store.ensure(progress) for store in stores), Built())
    streams = [store.streams() for store in stores]
    return Corpus(
        tokenizer=tokenizer,
        train=[train for train, _ in streams],
        held_out=[held_out for _, held_out in streams if held_out.tokens],
        report=Report(built, origin, tuple(name for part in splits for name in part.catalogue.skipped)),
        _splits=splits,
    )
