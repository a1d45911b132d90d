"""JSON lines: one document a line, in a field of its object."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from muster.data.parts import Advance, Part, Records, Scan, Text, record_pieces
from muster.data.sources import File
from muster.errors import DataError


def scan(file: File, text_field: str, advance: Advance) -> Scan:
    found, digest, stop = Scan(), hashlib.blake2b(digest_size=16), 0
    records = Records(file.name, found)
    with open(file.path, "rb") as opened:
        for row, line in enumerate(opened, start=1):
            digest.update(line)
            advance(len(line))
            stop += len(line)
            records.add(_text(line, text_field, f"{file.path}:{row}"))
            records.cut(stop)
    records.cut(stop, at_least_bytes=1)
    found.digest = digest.hexdigest()
    return found


def texts(file: File, part: Part, text_field: str) -> Iterator[Text]:
    with open(file.path, "rb") as opened:
        opened.seek(part.start)
        lines = opened.read(part.stop - part.start).split(b"\n")
    file.check_unchanged()
    for row, line in enumerate(lines, start=part.row):
        yield from record_pieces(file.name, row, _text(line, text_field, f"{file.path}:{row}"))


def _text(line: bytes, text_field: str, place: str) -> str:
    """The text of a record; "" for a blank line."""
    if not line.strip():
        return ""
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise DataError(f"{place}: {byte} of the line is not UTF-8: re-encode the file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}): every line must be one object") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: a {type(record).__name__} instead of an object with a field {text_field!r}"
        )
    if text_field not in record:
        raise DataError(
            f"{place}: no field {text_field!r} (it has {', '.join(list(record)[:8]) or 'none'}): "
            f"write text: NAME in data.train"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_field!r} is a {type(text).__name__} instead of text: mend the record"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"character {error.start} of field {text_field!r} is half a surrogate pair"
        raise DataError(f"{place}: {half}: mend the escape") from None
    return text
