"""The memory-mapped token store: text is tokenised once, in shards that survive a kill at any moment.

A finished shard is a whole file (temporary name, fsync, rename); the index that lists a source's shards
is written last. Whoever starts again, after a kill or with other files, makes only the shards that are
missing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from muster.data.build import build
from muster.data.cache import Cache
from muster.data.files import write_atomic
from muster.data.parts import Text
from muster.data.progress import Progress
from muster.data.shards import Record, Shard, Side, divide, read_record
from muster.data.split import Split
from muster.data.stream import Segment, TokenStream
from muster.data.tokenizer import Tokenizer
from muster.errors import DataError


@dataclass(frozen=True, slots=True)
class Built:
    """What was made and what was found."""

    shards: int = 0
    reused: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Built) -> Built:
        return Built(
            self.shards + other.shards,
            self.reused + other.reused,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        if not self.shards:
            return f"all {self.reused} shards reused"
        rate = self.tokens / max(self.seconds, 1e-9)
        made = f"tokenised {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s ({rate / 1e6:.2f}M tokens/s)"
        return made + (f", {self.reused} of {self.reused + self.shards} shards reused" if self.reused else "")


class Store:
    """The tokens of one source under one tokenizer and one split."""

    def __init__(self, split: Split, tokenizer: Tokenizer, cache: Cache) -> None:
        self._split, self._tokenizer, self._cache = split, tokenizer, cache
        self._shards = divide(split, tokenizer)
        keys = hashlib.blake2b("".join(shard.key for shard in self._shards).encode(), digest_size=16)
        self._index = cache.indexes / f"{keys.hexdigest()}.json"

    def ensure(self, progress: Progress) -> Built:
        """Make what is missing, if anything is. One process of a machine builds, the others wait."""
        if self._read_index() is None:
            with self._cache.lock():
                if self._read_index() is None:
                    return self._build(progress)
        return Built(reused=len(self._shards))

    def streams(self) -> tuple[TokenStream, TokenStream]:
        """The training and the held-out documents."""
        records = self._read_index()
        if records is None:
            raise DataError(f"{self._index} vanished: let nothing empty the cache while a run starts")
        files = list(zip(map(self._path, self._shards), records, strict=True))
        train = [Segment(path, 0, record.train.tokens) for path, record in files]
        held_out = [Segment(path, record.train.tokens, record.tokens) for path, record in files]
        return (
            self._stream(train, [record.train for record in records]),
            self._stream(held_out, [record.held_out for record in records]),
        )

    def _stream(self, segments: list[Segment], sides: list[Side]) -> TokenStream:
        total = sum(sides, Side())
        return TokenStream(
            self._split.catalogue.name,
            segments,
            self._tokenizer.dtype,
            documents=total.documents,
            size_bytes=total.bytes,
            weight=self._split.catalogue.source.weight,
        )

    def _path(self, shard: Shard) -> Path:
        return self._cache.shards / f"{shard.key}.tokens"

    def _read_index(self) -> list[Record] | None:
        """The index, if there is one and each of its files has the size that it says."""
        try:
            records = [Record.from_json(plain) for plain in json.loads(self._index.read_bytes())]
            sizes = [self._path(shard).stat().st_size for shard in self._shards]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return records if sizes == [record.file_bytes(self._tokenizer.dtype) for record in records] else None

    def _build(self, progress: Progress) -> Built:
        started_s = time.perf_counter()
        self._cache.sweep()
        found = [read_record(self._path(shard), self._tokenizer.dtype) for shard in self._shards]
        missing = [shard for shard, record in zip(self._shards, found, strict=True) if record is None]
        progress.start(sum(shard.text_bytes for shard in missing), "tokenising")
        try:
            work = [(self._path(shard), self._texts(shard)) for shard in missing]
            new = list(build(work, self._split, self._tokenizer, progress))
        finally:
            progress.done()
        made = iter(new)
        records = [record or next(made) for record in found]
        write_atomic(self._index, json.dumps([record.to_json() for record in records]).encode())
        total = sum((record.train + record.held_out for record in new), Side())
        reused = len(found) - len(new)
        return Built(len(new), reused, total.tokens, total.bytes, time.perf_counter() - started_s)

    def _texts(self, shard: Shard) -> Iterator[Text]:
        for entry, part in shard.parts:
            yield from self._split.catalogue.texts(entry, part)
