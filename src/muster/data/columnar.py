"""Parquet files and the Arrow files of Hugging Face data sets: one document a row, in a column of strings."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from muster.data.parts import PART_BYTES, Advance, Part, Records, Scan, Text, record_pieces
from muster.data.sources import File
from muster.errors import DataError, MissingExtra

# A part begins with opening the file again, so it is larger than in the formats where that costs nothing.
_PART_BYTES = 16 * PART_BYTES


def scan(file: File, text_field: str, advance: Advance) -> Scan:
    found, digest = Scan(), hashlib.blake2b(digest_size=16)
    with open(file.path, "rb") as opened:
        while block := opened.read(PART_BYTES):
            digest.update(block)
            advance(len(block))
    records = Records(file.name, found)
    with _open(file.path, text_field) as table:
        for group in range(table.groups):
            for text in table.texts(group):
                records.add(text)
            records.cut(group + 1, _PART_BYTES)
        records.cut(table.groups, at_least_bytes=1)
    found.digest = digest.hexdigest()
    return found


def texts(file: File, part: Part, text_field: str) -> Iterator[Text]:
    row = part.row
    with _open(file.path, text_field) as table:
        for group in range(part.start, part.stop):
            for text in table.texts(group):
                yield from record_pieces(file.name, row, text)
                row += 1
    file.check_unchanged()


@contextlib.contextmanager
def _open(path: Path, column: str) -> Iterator[_Table]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra(f"reading {path}", "parquet") from None
    with contextlib.ExitStack() as stack:
        try:
            if path.suffix.lower() == ".arrow":
                opened: Any = stack.enter_context(pyarrow.memory_map(str(path)))
                table: _Table = _ArrowTable(pyarrow.ipc.open_stream(opened), column)
            else:
                table = _ParquetTable(stack.enter_context(parquet.ParquetFile(path)), column)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as a columnar file ({error}): exclude or replace it"
            ) from None
        names = table.schema.names
        if column not in names:
            has = ", ".join(names[:8])
            raise DataError(f"{path}: no column {column!r} (it has {has}): write text: NAME in data.train")
        kind = table.schema.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(
                f"{path}: column {column!r} holds {kind} instead of strings: name another with text: NAME"
            )
        yield table


class _Table(Protocol):
    """Groups of rows, each read by itself; a null is an empty text."""

    schema: Any
    groups: int

    def texts(self, group: int) -> Iterator[str]: ...


class _ParquetTable:
    def __init__(self, opened: Any, column: str) -> None:
        self._opened, self._column = opened, column
        self.schema, self.groups = opened.schema_arrow, opened.num_row_groups

    def texts(self, group: int) -> Iterator[str]:
        for batch in self._opened.iter_batches(batch_size=1024, row_groups=[group], columns=[self._column]):
            for text in batch.column(0).to_pylist():
                yield text or ""


class _ArrowTable:
    def __init__(self, opened: Any, column: str) -> None:
        self._batches, self._column = list(opened), column  # maps of the file, not copies
        self.schema, self.groups = opened.schema, len(self._batches)

    def texts(self, group: int) -> Iterator[str]:
        for text in self._batches[group].column(self._column).to_pylist():
            yield text or ""
