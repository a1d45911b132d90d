"""How a file is divided: into parts that are read, and pieces that are encoded, by themselves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PART_BYTES = 1 << 20
PIECE_BYTES = 1 << 17

Advance = Callable[[int], None]
"""Told how many more bytes of a file were read."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a file that is read by itself."""

    start: int
    stop: int
    """Bytes [start, stop) of text and .jsonl, groups of records [start, stop) of columnar files."""
    row: int
    """Number of the first record, counted from 1; 0 in a text file, which is one document as a whole."""
    text_bytes: int


@dataclass(slots=True)
class Scan:
    """What one reading of a whole file found."""

    digest: str = ""
    parts: list[Part] = field(default_factory=list)
    documents: int = 0
    lowest: int = 1 << 64
    highest: int = -1
    """Range of the documents' name hashes, by which they are split into training and held-out ones."""
    problem: str = ""
    """Why a text file is none."""

    def count(self, name: str) -> None:
        """Take a document that is not empty into account."""
        place = name_hash(name)
        self.documents += 1
        self.lowest, self.highest = min(self.lowest, place), max(self.highest, place)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of a document, small enough that a batch of them keeps every core busy."""

    document: str
    text: str
    size_bytes: int
    begins: bool
    ends: bool
    """Whether the document begins and ends with this piece."""


def name_hash(name: str) -> int:
    """64 bits that depend on a document's name alone."""
    return int.from_bytes(
        hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big"
    )


def cuts(data: bytes, limit: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Bounds of the pieces, of at most `limit` bytes, that data is divided into."""
    start = 0
    while len(data) - start > limit:
        stop = start + cut(data[start : start + limit])
        yield start, stop
        start = stop
    if start < len(data):
        yield start, len(data)


_UNINDENTED_LINE = re.compile(rb"\n(?=[!-~])")


def cut(data: bytes) -> int:
    """Where in its second half to cut data from what follows it.

    Between a line break and a printable character every byte-level pre-tokenizer in use cuts anyway, so
    that the tokens are those of the undivided text. Otherwise behind a line break, else between characters.
    """
    half = len(data) // 2
    lines = [line.end() for line in _UNINDENTED_LINE.finditer(data, half)]
    if lines:
        return lines[-1]
    line = data.rfind(b"\n", half)
    if line >= 0:
        return line + 1
    # A character has at most four bytes, and those behind the first begin with the bits 10.
    start = next((len(data) - back for back in range(1, 5) if data[-back] & 0xC0 != 0x80), len(data))
    return start if start > half else len(data)


class Records:
    """Gathers the records of a file, counted from 1, into the parts of its scan."""

    def __init__(self, name: str, found: Scan) -> None:
        self._name, self._found = name, found
        self._start, self._first, self._bytes = 0, 1, 0
        self.rows = 0

    def add(self, text: str) -> None:
        """The next record; one without text counts as a record, but not as a document."""
        self.rows += 1
        if text.strip():
            self._bytes += len(text.encode())
            self._found.count(record_name(self._name, self.rows))

    def cut(self, stop: int, at_least_bytes: int = PART_BYTES) -> None:
        """A part may end at `stop`, and does if it has become large enough."""
        if self._bytes < at_least_bytes:
            return
        if self._bytes:
            self._found.parts.append(Part(self._start, stop, self._first, self._bytes))
        self._start, self._first, self._bytes = stop, self.rows + 1, 0


def record_name(file: str, row: int) -> str:
    return f"{file}#{row}"


def record_pieces(file: str, row: int, text: str) -> Iterator[Text]:
    """Pieces of one record; none if it has no text."""
    if not text.strip():
        return
    name, data = record_name(file, row), text.encode()
    if len(data) <= PIECE_BYTES:
        yield Text(name, text, len(data), True, True)
        return
    for start, stop in cuts(data):
        yield Text(name, data[start:stop].decode(), stop - start, start == 0, stop == len(data))
