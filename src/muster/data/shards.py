"""A shard: the tokens of a few megabytes of documents, training ones first, then held-out ones, in one file.

The file is raw little-endian token ids, then a JSON record of what they are, then that record's
length in four bytes. It is named by everything that its content depends on, so that a shard that
exists never needs to be made again, whichever run it was made for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muster.data.catalogue import Entry
from muster.data.parts import Part, name_hash
from muster.data.split import Split
from muster.data.tokenizer import Tokenizer

_VERSION = 1
_LEAST_BYTES = 4 << 20
_MOST_SHARDS = 128


@dataclass(frozen=True, slots=True)
class Side:
    """Totals of the training or the held-out documents of a shard."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0

    def __add__(self, other: Side) -> Side:
        return Side(self.tokens + other.tokens, self.documents + other.documents, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Record:
    """What a shard file says about itself."""

    train: Side
    held_out: Side
    crc32: int

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.held_out.tokens

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Record:
        """Raises KeyError and TypeError when it is something else."""
        return cls(Side(**plain["train"]), Side(**plain["held_out"]), plain["crc32"])

    def footer(self) -> bytes:
        """What follows the tokens in the file."""
        record = json.dumps(self.to_json()).encode()
        return record + len(record).to_bytes(4, "little")

    def file_bytes(self, dtype: np.dtype[Any]) -> int:
        return self.tokens * dtype.itemsize + len(self.footer())


@dataclass(frozen=True, slots=True)
class Shard:
    """Parts of a source that make one file."""

    key: str
    """Hash of everything the file's content depends on."""
    parts: list[tuple[Entry, Part]]

    @property
    def text_bytes(self) -> int:
        return sum(part.text_bytes for _, part in self.parts)


def read_record(path: Path, dtype: np.dtype[Any]) -> Record | None:
    """What a shard file holds, or None if it is absent, truncated or corrupt; reads all of it."""
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        end = len(content) - 4 - int.from_bytes(content[-4:].tobytes(), "little")
        record = Record.from_json(json.loads(content[end:-4].tobytes()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    is_sound = len(content) == record.file_bytes(dtype) and zlib.crc32(content[:end].data) == record.crc32
    return record if is_sound else None


def divide(split: Split, tokenizer: Tokenizer) -> list[Shard]:
    """The shards of a source."""
    shards = []
    for parts in _groups(split):
        content = [_VERSION, tokenizer.digest, [split.identity(entry, part) for entry, part in parts]]
        key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        shards.append(Shard(key, parts))
    return shards


def _groups(split: Split) -> Iterator[list[tuple[Entry, Part]]]:
    """Parts in order, in groups whose borders depend on the names near them, not on what came before.

    So a file that grows, comes or goes changes one or two shards and not all that follow (content-defined
    chunking, as in rsync and backup programs). Large corpora have larger shards, not ever more of them.
    """
    target = _LEAST_BYTES
    while target * _MOST_SHARDS < split.catalogue.text_bytes:
        target *= 2
    group: list[tuple[Entry, Part]] = []
    size = 0
    for entry in split.catalogue.entries:
        for part in entry.scan.parts:
            may_end = size >= target // 2 and name_hash(f"{entry.file.name}@{part.start}") % 8 == 0
            if may_end or size >= 2 * target:
                yield group
                group, size = [], 0
            group.append((entry, part))
            size += part.text_bytes
    if group:
        yield group
