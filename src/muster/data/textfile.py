"""Text and source code: one document a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from muster.data.parts import PART_BYTES, Advance, Part, Scan, Text, cut, cuts
from muster.data.sources import File


def scan(file: File, text_field: str, advance: Advance) -> Scan:
    found, digest, start = Scan(), hashlib.blake2b(digest_size=16), 0
    is_blank = True
    with open(file.path, "rb") as opened:
        for block in _blocks(opened):
            digest.update(block)
            advance(len(block))
            nul = block.find(b"\0")
            if nul >= 0:
                return Scan(problem=f"NUL byte at offset {start + nul}")
            try:
                is_blank = not block.decode().strip() and is_blank
            except UnicodeDecodeError as error:
                return Scan(problem=f"byte 0x{block[error.start]:02x} at offset {start + error.start}")
            found.parts.append(Part(start, start + len(block), 0, len(block)))
            start += len(block)
    found.digest = digest.hexdigest()
    if is_blank:
        found.parts.clear()
    else:
        found.count(file.name)
    return found


def texts(file: File, part: Part, text_field: str) -> Iterator[Text]:
    with open(file.path, "rb") as opened:
        opened.seek(part.start)
        data = opened.read(part.stop - part.start)
    file.check_unchanged()
    for start, stop in cuts(data):
        begins, ends = part.start + start == 0, part.start + stop == file.size_bytes
        yield Text(file.name, data[start:stop].decode(), stop - start, begins, ends)


def _blocks(opened: BinaryIO) -> Iterator[bytes]:
    """A file in blocks of at most a part."""
    data = opened.read(PART_BYTES)
    while len(data) == PART_BYTES:
        end = cut(data)
        yield data[:end]
        data = data[end:] + opened.read(end)
    if data:
        yield data
