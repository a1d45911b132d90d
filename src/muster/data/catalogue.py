"""What a source holds: its files with digests and parts, found by reading everything once and remembered.

A remembered catalogue is trusted if every file has the size, times and inode it had then, and the
catalogue was taken well after the last write (the rule by which git trusts its index): a file written to
in the same tick of the clock as its scan looks unchanged, so such catalogues are not kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from muster.config.schema import Source
from muster.data import formats
from muster.data.cache import Cache
from muster.data.files import write_atomic
from muster.data.parts import Part, Scan, Text
from muster.data.progress import Progress
from muster.data.sources import File, list_files
from muster.errors import DataError

_VERSION = 1
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system in use (FAT)
_TOLERATED = 0.01


@dataclass(frozen=True, slots=True)
class Entry:
    """A file and what its scan found."""

    file: File
    scan: Scan


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The documents of one source, in order."""

    source: Source
    entries: list[Entry]
    """Files that hold at least one document."""
    skipped: list[str]
    """Files left out because they are not text, with the reason."""

    @property
    def name(self) -> str:
        files = self.source.files
        return self.source.hf or (files if isinstance(files, str) else ", ".join(files or ()))

    @property
    def documents(self) -> int:
        return sum(entry.scan.documents for entry in self.entries)

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for entry in self.entries for part in entry.scan.parts)

    @property
    def lowest(self) -> int:
        return min(entry.scan.lowest for entry in self.entries)

    @property
    def highest(self) -> int:
        return max(entry.scan.highest for entry in self.entries)

    def texts(self, entry: Entry, part: Part) -> Iterator[Text]:
        return formats.texts(entry.file, part, self.source.text)


def take(source: Source, base: Path, cache: Cache, progress: Progress) -> Catalogue:
    """The catalogue of a source, from the cache if nothing has changed.

    A text file with a NUL byte or invalid UTF-8 is left out and reported, because one odd file among
    thousands should not stop a run. When more than 1 % of the files are like that, the glob is probably not
    what was meant, and it is a DataError.
    """
    files = list_files(source, base)
    path = cache.catalogues / f"{_key(source, files)}.json"
    scans = _remembered(path)
    if scans is None:
        started_ns = time.time_ns()
        scans = _scan_all(files, source.text, progress)
        if max(file.changed_ns for file in files) < started_ns - _SETTLED_NS:
            with cache.lock():
                write_atomic(path, json.dumps([dataclasses.asdict(scan) for scan in scans]).encode())
    pairs = [Entry(file, scan) for file, scan in zip(files, scans, strict=True)]
    skipped = [f"{entry.file.name} ({entry.scan.problem})" for entry in pairs if entry.scan.problem]
    catalogue = Catalogue(source, [entry for entry in pairs if entry.scan.documents], skipped)
    if len(skipped) > _TOLERATED * len(files):
        raise DataError(
            f"{len(skipped)} of the {len(files)} files of {catalogue.name} are not UTF-8 text, first "
            f"{', '.join(skipped[:3])}: exclude or re-encode them"
        )
    if not catalogue.entries:
        raise DataError(f"the {len(files)} files of {catalogue.name} hold no text: name files that do")
    return catalogue


def _scan_all(files: list[File], text_field: str, progress: Progress) -> list[Scan]:
    progress.start(sum(file.size_bytes for file in files), "reading")
    try:
        return [formats.scan(file, text_field, progress.advance) for file in files]
    finally:
        progress.done()


def _key(source: Source, files: list[File]) -> str:
    listing = [[file.name, str(file.path), file.size_bytes, *file.stamp] for file in files]
    content = json.dumps([_VERSION, source.text, listing])
    return hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _remembered(path: Path) -> list[Scan] | None:
    try:
        plain = json.loads(path.read_bytes())
        return [Scan(**(scan | {"parts": [Part(**part) for part in scan["parts"]]})) for scan in plain]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
